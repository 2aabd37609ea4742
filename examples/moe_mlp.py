"""A routed MLP (mixture of experts) whose tokens go through in chunks, by `jaxchunk.interleave`.

Routing sorts tokens by expert and puts them back (memory-bound); between the two lie the experts' matrix products
(compute-bound). Each token's result depends on that token alone, so chunks of tokens may go through one after the
other: the two kinds of work alternate, and the sorted copies are a chunk in size.

`python examples/moe_mlp.py` takes a few seconds on a CPU. It compares result, gradients and memory with those of all
tokens at once.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxchunk import interleave

T, D, F, E, K = 4096, 64, 128, 8, 2  # tokens, width, width of an expert, experts, experts a token
CHUNKS = 8


def init(key):
    keys = jax.random.split(key, 4)
    shapes = {"router": (D, E), "gate": (E, D, F), "up": (E, D, F), "down": (E, F, D)}
    return {n: jax.random.normal(k, s) / s[-2] ** 0.5 for (n, s), k in zip(shapes.items(), keys, strict=True)}


def route(x, weights):
    """[C, D] -> rows sorted by expert [C * K, D], and what it takes to put them back."""
    scores, experts = jax.lax.top_k(jax.nn.softmax(x @ weights["router"]), K)
    order = jnp.argsort(experts.reshape(-1), stable=True)
    sizes = jnp.bincount(experts.reshape(-1), length=E)
    return x[order // K], sizes, order, scores / jnp.sum(scores, axis=-1, keepdims=True)


def experts_mlp(routed, weights):
    """The experts' products, each over the rows that are its own."""
    rows, sizes, order, scores = routed
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, weights["gate"], sizes))
    hidden *= jax.lax.ragged_dot(rows, weights["up"], sizes)
    return jax.lax.ragged_dot(hidden, weights["down"], sizes), order, scores


def combine(processed, weights):
    """Back into the tokens' order, weighted by the router's scores: [C, D]."""
    rows, order, scores = processed
    back = jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
    return jnp.einsum("tk,tkd->td", scores, back.reshape(-1, K, rows.shape[-1]))


def loss(weights, x, target, num_chunks):
    y = interleave([route, experts_mlp, combine], x, weights, num_chunks=num_chunks, remat=num_chunks > 1)
    return jnp.mean((y - target) ** 2)


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    weights, x, target = init(keys[0]), jax.random.normal(keys[1], (T, D)), jax.random.normal(keys[2], (T, D))
    results, temporaries = [], []
    for num_chunks in (1, CHUNKS):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=3)
        results.append(step(weights, x, target, num_chunks))
        memory = step.lower(weights, x, target, num_chunks).compile().memory_analysis()
        temporaries.append(memory.temp_size_in_bytes / 2**20)
        print(f"{num_chunks} chunk(s): loss {results[-1][0]:.6f}, {temporaries[-1]:.0f} MiB of temporaries")
    errors = jax.tree.map(lambda a, b: np.max(np.abs(a - b)) / np.max(np.abs(a)), results[0][1], results[1][1])
    print(f"largest difference of a gradient, of its largest element: {max(jax.tree.leaves(errors)):.1e}")


if __name__ == "__main__":
    main()
