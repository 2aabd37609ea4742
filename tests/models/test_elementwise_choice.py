"""How norms and SwiGLU run where nothing, or something, is asked for; and that only kernels need Triton."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxchunk.models.elementwise_choice import choose_elementwise


def test_kernels_are_chosen_where_they_run():
    is_gpu = jax.default_backend() == "gpu"
    choice, reason = choose_elementwise(None, jnp.bfloat16)
    assert choice == ("pallas" if is_gpu else "xla") and "NVIDIA GPU" in reason
    assert choose_elementwise("xla", jnp.bfloat16) == ("xla", "named by the caller")
    if not is_gpu:
        with pytest.raises(
            ValueError, match=r"--elementwise pallas cannot run: it needs an NVIDIA GPU and JAX runs on .*; use xla"
        ):
            choose_elementwise("pallas", jnp.bfloat16)


def test_kernels_are_chosen_for_a_gpu_that_is_not_here():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("a",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert choose_elementwise(None, jnp.bfloat16)[0] == "pallas"


def test_a_model_without_kernels_needs_no_triton():
    """JAX has it on Linux and may not elsewhere: the trainer has to start without."""
    program = "import sys; sys.modules['jax.experimental.pallas.triton'] = None; import jaxchunk.training.plan"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
