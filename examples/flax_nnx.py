"""A causal LM in Flax NNX with an `nnx.Linear` head, whose kernel is [D, V]: `weight_layout="dv"`.

The model learns to write this file. `python examples/flax_nnx.py` takes a few seconds on a CPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxchunk import lm_head_loss

V, D, S, B = 256, 64, 64, 16  # vocabulary (bytes), width, sequence, batch
STEPS = 60


class LM(nnx.Module):
    """Embedding, one layer that mixes positions, an MLP, and a head that is applied by the loss."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(V, D, rngs=rngs)
        self.mixing = nnx.Param(jnp.zeros((S, S)))  # how much every position takes from those before it
        self.up = nnx.Linear(D, 4 * D, rngs=rngs)
        self.down = nnx.Linear(4 * D, D, rngs=rngs)
        self.head = nnx.Linear(D, V, use_bias=False, rngs=rngs)

    def __call__(self, tokens):  # [B, S] -> [B, S, D]: hidden states, no longer logits
        x = self.embedding(tokens)
        causal = jnp.tril(jnp.ones((S, S), bool))
        x = x + jax.nn.softmax(self.mixing[...], axis=-1, where=causal) @ x
        return x + self.down(nnx.gelu(self.up(x)))


def loss_fn(model, tokens, labels):
    hidden = model(tokens)
    # Before:
    #   logits = model.head(hidden)  # [B, S, V]
    #   loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    # Now, with a z-loss and metrics out of the same pass:
    kernel = model.head.kernel[...]
    return lm_head_loss(hidden, kernel, labels, weight_layout="dv", num_chunks=4, z_loss=1e-4, with_metrics=True)


@nnx.jit
def train_step(model, optimizer, tokens, labels):
    (loss, metrics), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(model, tokens, labels)
    optimizer.update(model, gradients)
    return loss, metrics


def batches(rng):
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    while True:
        starts = rng.integers(0, len(text) - S, size=B)
        windows = text[starts[:, None] + np.arange(S + 1)]
        yield windows[:, :-1], windows[:, 1:]


def main():
    model = LM(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    data = batches(np.random.default_rng(0))
    for step in range(1, STEPS + 1):
        loss, metrics = train_step(model, optimizer, *next(data))
        if step in (1, STEPS):
            print(f"step {step}: loss {loss:.3f}, accuracy {metrics.accuracy:.1%}")


if __name__ == "__main__":
    main()
