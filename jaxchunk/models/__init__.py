"""Models whose LM head is the chunked loss."""

from jaxchunk.models import hf, qwen2

__all__ = ["hf", "qwen2"]
