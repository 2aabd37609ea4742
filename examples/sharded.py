"""The loss over a data x model mesh: tokens sharded over "data", the vocabulary over "model".

Compares the loss and its gradients with those of one device. `python examples/sharded.py` takes all accelerators that
JAX finds, or 8 simulated CPU devices.
"""

import jax
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxchunk import lm_head_loss

V, D, S, B = 512, 64, 32, 16  # vocabulary, width, sequence, batch


def single_device_loss(weight, hidden, labels):
    return lm_head_loss(hidden, weight, labels, num_chunks=4)


def sharded_loss(weight, hidden, labels):
    # No jax.shard_map around it: the loss wraps itself. The mean is over the valid tokens of all shards. Row statistics
    # and the gradient of `hidden` cross "model", that of `weight` crosses "data"; no device sees a whole row of logits.
    return lm_head_loss(hidden, weight, labels, num_chunks=4, token_axis="data", vocab_axis="model")


def main():
    jax.config.update("jax_num_cpu_devices", 8)  # before JAX starts; changes nothing on accelerators
    model = 2 if jax.device_count() % 2 == 0 else 1
    # Over Auto axes the loss is told their names, as above; over Explicit ones (JAX's default) it finds them itself.
    mesh = jax.make_mesh((jax.device_count() // model, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    rng = np.random.default_rng(0)
    weight = rng.normal(size=(V, D), scale=D**-0.5).astype(np.float32)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    labels = rng.integers(0, V, size=(B, S))
    labels[: B // 4, S // 2 :] = -100  # padding, so that shards differ in their number of valid tokens

    value_and_gradients = jax.value_and_grad(single_device_loss, argnums=(0, 1))
    expected, (expected_dw, expected_dh) = jax.jit(value_and_gradients)(weight, hidden, labels)

    with jax.set_mesh(mesh):
        weight = jax.device_put(weight, P("model", None))  # [V, D]
        hidden = jax.device_put(hidden, P("data", None, None))  # [B, S, D]
        labels = jax.device_put(labels, P("data", None))  # [B, S]
        value_and_gradients = jax.value_and_grad(sharded_loss, argnums=(0, 1))
        loss, (dw, dh) = jax.jit(value_and_gradients)(weight, hidden, labels)

    print(f"mesh {dict(mesh.shape)}: loss {loss:.6f}, on one device {expected:.6f}")
    print(f"gradients stay where their arrays are: weight {dw.sharding.spec}, hidden {dh.sharding.spec}")
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(dw, expected_dw, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(dh, expected_dh, rtol=1e-4, atol=1e-7)
    print("loss and gradients agree with one device")


if __name__ == "__main__":
    main()
