"""A causal LM in Equinox with an `eqx.nn.Linear` head, whose weight is [V, D] and which has a bias.

The model learns to write this file. `python examples/equinox_module.py` takes a few seconds on a CPU.
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxchunk import lm_head_loss

V, D, S, B = 256, 64, 64, 16  # vocabulary (bytes), width, sequence, batch
STEPS = 60

optimizer = optax.adamw(1e-2)


class LM(eqx.Module):
    """Embedding, one layer that mixes positions, an MLP, and a head that is applied by the loss."""

    embedding: eqx.nn.Embedding
    mixing: jax.Array  # how much every position takes from those before it
    mlp: eqx.nn.MLP
    head: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.embedding = eqx.nn.Embedding(V, D, key=k1)
        self.mixing = jnp.zeros((S, S))
        self.mlp = eqx.nn.MLP(D, D, width_size=4 * D, depth=1, activation=jax.nn.gelu, key=k2)
        self.head = eqx.nn.Linear(D, V, key=k3)

    def __call__(self, tokens):  # [S] -> [S, D]: hidden states, no longer logits
        x = jax.vmap(self.embedding)(tokens)
        causal = jnp.tril(jnp.ones((S, S), bool))
        x = x + jax.nn.softmax(self.mixing, axis=-1, where=causal) @ x
        return x + jax.vmap(self.mlp)(x)


def loss_fn(model, tokens, labels):
    hidden = jax.vmap(model)(tokens)  # [B, S, D]; the loss takes the whole batch, outside of vmap
    # Before:
    #   logits = jax.vmap(jax.vmap(model.head))(hidden)  # [B, S, V]
    #   loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    # Now, with a z-loss and metrics out of the same pass:
    weight, bias = model.head.weight, model.head.bias
    return lm_head_loss(hidden, weight, labels, bias=bias, num_chunks=4, z_loss=1e-4, with_metrics=True)


@eqx.filter_jit
def train_step(model, state, tokens, labels):
    (loss, metrics), gradients = eqx.filter_value_and_grad(loss_fn, has_aux=True)(model, tokens, labels)
    updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
    return eqx.apply_updates(model, updates), state, loss, metrics


def batches(rng):
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    while True:
        starts = rng.integers(0, len(text) - S, size=B)
        windows = text[starts[:, None] + np.arange(S + 1)]
        yield windows[:, :-1], windows[:, 1:]


def main():
    model = LM(jax.random.key(0))
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    data = batches(np.random.default_rng(0))
    for step in range(1, STEPS + 1):
        model, state, loss, metrics = train_step(model, state, *next(data))
        if step in (1, STEPS):
            print(f"step {step}: loss {loss:.3f}, accuracy {metrics.accuracy:.1%}")


if __name__ == "__main__":
    main()
