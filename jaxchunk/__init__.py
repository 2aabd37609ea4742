"""jaxchunk: the LM head in token chunks, for JAX."""

from jaxchunk.interleaving import interleave
from jaxchunk.lm_head import LMHeadMetrics, choose_implementation, lm_head_loss, token_log_probs

__all__ = ["LMHeadMetrics", "choose_implementation", "interleave", "lm_head_loss", "token_log_probs"]
__version__ = "0.3.0.dev0"
