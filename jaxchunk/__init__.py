"""jaxchunk: the LM head in token chunks, for JAX."""

from jaxchunk.lm_head import lm_head_loss

__all__ = ["lm_head_loss"]
__version__ = "0.1.0"
