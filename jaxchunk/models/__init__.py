"""Models whose LM head is the chunked loss."""

from jaxchunk.models import qwen2

__all__ = ["qwen2"]
