"""A causal LM in plain JAX: parameters in a dict, and the output matrix tied to the embedding.

The model learns to write this file. `python examples/plain_pytrees.py` takes a few seconds on a CPU.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxchunk import lm_head_loss

V, D, S, B = 256, 64, 64, 16  # vocabulary (bytes), width, sequence, batch
STEPS = 60

optimizer = optax.adamw(1e-2)


def init(key):
    k1, k2, k3 = jax.random.split(key, 3)
    return {
        "embedding": jax.random.normal(k1, (V, D)) * D**-0.5,
        "mixing": jnp.zeros((S, S)),  # how much every position takes from those before it
        "up": jax.random.normal(k2, (D, 4 * D)) * D**-0.5,
        "down": jax.random.normal(k3, (4 * D, D)) * (4 * D) ** -0.5,
    }


def hidden_states(params, tokens):  # [B, S] -> [B, S, D]
    x = params["embedding"][tokens]
    causal = jnp.tril(jnp.ones((S, S), bool))
    x = x + jax.nn.softmax(params["mixing"], axis=-1, where=causal) @ x
    return x + jax.nn.gelu(x @ params["up"]) @ params["down"]


def loss_fn(params, tokens, labels):
    hidden = hidden_states(params, tokens)
    # Before:
    #   logits = hidden @ params["embedding"].T  # [B, S, V]
    #   loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    # Now, with a z-loss and metrics out of the same pass:
    return lm_head_loss(hidden, params["embedding"], labels, num_chunks=4, z_loss=1e-4, with_metrics=True)


@jax.jit
def train_step(params, state, tokens, labels):
    (loss, metrics), gradients = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens, labels)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss, metrics


def batches(rng):
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8).astype(np.int32)
    while True:
        starts = rng.integers(0, len(text) - S, size=B)
        windows = text[starts[:, None] + np.arange(S + 1)]
        yield windows[:, :-1], windows[:, 1:]


def main():
    params = init(jax.random.key(0))
    state = optimizer.init(params)
    data = batches(np.random.default_rng(0))
    for step in range(1, STEPS + 1):
        params, state, loss, metrics = train_step(params, state, *next(data))
        if step in (1, STEPS):
            print(f"step {step}: loss {loss:.3f}, accuracy {metrics.accuracy:.1%}")


if __name__ == "__main__":
    main()
