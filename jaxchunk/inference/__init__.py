"""A model at work: prefill in chunks, generation with a key/value cache, log-probabilities of a text.

`attention` has a chunk attend to what came before it, `cache` what is remembered, `prefill` prompts, `generation` what
follows them, `scoring` how probable a text is.
"""

from jaxchunk.inference.cache import Cache, empty_cache, extend
from jaxchunk.inference.generation import GREEDY, Generated, Sampling, generate, next_token, pad_prompts, stream
from jaxchunk.inference.prefill import prefill, unstack_layers
from jaxchunk.inference.scoring import score

__all__ = [
    "GREEDY",
    "Cache",
    "Generated",
    "Sampling",
    "empty_cache",
    "extend",
    "generate",
    "next_token",
    "pad_prompts",
    "prefill",
    "score",
    "stream",
    "unstack_layers",
]
