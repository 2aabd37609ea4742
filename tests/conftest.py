"""Shared by all tests: strictness, simulated devices, and the GPU marker."""

import os
import signal

import jax
import pytest

# A shell that starts tests in the background has Ctrl-C ignored, by them and by the scripts that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
if jax.version.__version_info__ < (0, 11):  # its code generator for fusions takes two thirds of these tests' time
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
