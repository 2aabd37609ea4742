"""Shared by all tests: strictness, simulated devices, and the GPU marker."""

import gc
import os
import signal

import jax
import pytest

# A shell that starts tests in the background has Ctrl-C ignored, by them and by the scripts that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# JAX keeps what it traced; at the default, looking over it again and again is a seventh of the tests' time.
gc.set_threshold(50_000, 20, 20)
# Most of the tests' time is XLA's, for programs that run once. JAX 0.10 spends two thirds of it on an MLIR pipeline for
# every fusion; later versions have no other code generator.
if jax.version.__version_info__ < (0, 11):
    quick = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)  # for meshes; everything else runs on the first one


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
