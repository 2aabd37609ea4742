"""How norms and SwiGLU run where nothing, or something, is asked for; and that only kernels need Triton."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.models.elementwise_choice import choose_elementwise


def test_kernels_are_named_and_only_where_they_run():
    choice, reason = choose_elementwise(None, jnp.bfloat16)
    assert choice == "xla" and reason
    assert choose_elementwise("xla", jnp.bfloat16) == ("xla", "named by the caller")
    if jax.default_backend() != "gpu":
        with pytest.raises(
            ValueError, match=r"--elementwise pallas cannot run: it needs an NVIDIA GPU and JAX runs on .*; use xla"
        ):
            choose_elementwise("pallas", jnp.bfloat16)


def test_a_model_without_kernels_needs_no_triton():
    """JAX has it on Linux and may not elsewhere: the trainer has to start without."""
    program = "import sys; sys.modules['jax.experimental.pallas.triton'] = None; import jaxchunk.training.plan"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
