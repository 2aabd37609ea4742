"""The chunked LM-head loss. Imports nothing from the rest of jaxchunk, so that it can be lifted out."""

from jaxchunk.lm_head.api import lm_head_loss, split_rows
from jaxchunk.lm_head.dispatch import Choice, Implementation, choose_implementation

__all__ = ["Choice", "Implementation", "choose_implementation", "lm_head_loss", "split_rows"]
