"""The chunked LM-head loss. Imports nothing from the rest of jaxchunk, so that it can be lifted out."""

from jaxchunk.lm_head.api import lm_head_loss, token_log_probs
from jaxchunk.lm_head.chunks import split_rows
from jaxchunk.lm_head.dispatch import Choice, Head, Implementation, choose_implementation, makes_logits
from jaxchunk.lm_head.metrics import LMHeadMetrics

__all__ = [
    "Choice",
    "Head",
    "Implementation",
    "LMHeadMetrics",
    "choose_implementation",
    "lm_head_loss",
    "makes_logits",
    "split_rows",
    "token_log_probs",
]
