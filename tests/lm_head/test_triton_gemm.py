"""The exponentials kernel for GPUs without wgmma: in JAX's interpreter, lowered for such GPUs, and on a GPU."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from lm_head_oracle import (
    assert_as_exact,
    assert_kernel_as_plain,
    has_array,
    loss_program,
    oracle,
    problem,
    same_dtype_baseline,
    value_and_grads,
)

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import dispatch
from jaxchunk.lm_head.kernels import triton_gemm, tuned
from jaxchunk.lm_head.kernels.triton_gemm import TritonTiles
from jaxchunk.lm_head.rows import RowOptions
from jaxchunk.models.elementwise_choice import choose_elementwise

SMALL = TritonTiles(tile_m=16, tile_n=32, tile_k=16, group=2)
OPTIONS = {
    "plain": {},
    "scale": {"logit_scale": 0.7},
    "metrics": {"metrics": True},
    "softcap": {"softcap": 3.0},
    "softcap and metrics": {"softcap": 3.0, "metrics": True, "logit_scale": 1.5},
}
without_wgmma = pytest.mark.parametrize("device", ["NVIDIA GeForce RTX 4090", "NVIDIA GB10", "NVIDIA A100"])


def operands(C, D, V):
    p = problem(C, D, V, jnp.bfloat16)
    labels = jnp.where(p.labels >= 0, p.labels, -1)
    offset = jnp.where(labels >= 0, jnp.round(jnp.linspace(-3.0, 3.0, C)), jnp.inf)
    return p.hidden, p.weight, offset, labels


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize(("shape", "has_bias"), [((37, 40, 97), True), ((1, 7, 1), False)], ids=str)
def test_exponentials_in_the_interpreter(shape, has_bias, options):
    given, options = operands(*shape), RowOptions(shape[2], **options)
    bias = jnp.linspace(-1.0, 1.0, shape[2]) if has_bias else None
    kernel = functools.partial(triton_gemm.exponentials, config=SMALL, interpret=True)
    assert_kernel_as_plain(kernel, *given, bias, options)


@pytest.mark.parametrize("group", [1, 3, 8])
def test_every_tile_is_somebody_s(group):
    tiles = {tuple(map(int, triton_gemm._tile(jnp.int32(i), 5, 7, group))) for i in range(35)}
    assert tiles == {(m, n) for m in range(5) for n in range(7)}


@pytest.fixture
def fresh_programs():
    """Programs that were traced before a kernel is exchanged know nothing of it, nor shall later tests have its own."""
    loss_program.cache_clear()
    yield
    loss_program.cache_clear()


@pytest.mark.parametrize("options", [{}, {"z_loss": 1e-2, "with_metrics": True}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("implementation", ["fused_xla"])
def test_the_loss_over_it(monkeypatch, fresh_programs, implementation, options):
    kernel = functools.partial(triton_gemm.exponentials, config=SMALL, interpret=True)
    monkeypatch.setattr(dispatch, "exponentials", lambda implementation: kernel)
    p, cotangent = problem(37, 40, 97, jnp.bfloat16), 1.0
    if options.get("reduction") == "none":
        cotangent = np.linspace(-1.0, 2.0, 37)
    result = value_and_grads(p, cotangent, num_chunks=3, implementation=implementation, **options)
    exact, baseline = (f(p, cotangent, **options) for f in (oracle, same_dtype_baseline))
    assert_as_exact(result, exact, baseline, jnp.bfloat16)


def on(device):
    abstract = AbstractDevice(device_kind=device, num_cores=48, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=abstract))


@without_wgmma
@pytest.mark.parametrize("options", [{}, {"logit_softcap": 30.0, "with_metrics": True}, {"reduction": "none"}], ids=str)
def test_fused_lowers_for_gpus_without_wgmma(device, options, caplog):
    shapes, dtypes = ((500, 72), (1187, 72), (500,)), ("bfloat16", "float32", "int32")
    given = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    tuned._choose.cache_clear()

    def loss(*xs):
        result = lm_head_loss(*xs, num_chunks=2, implementation="fused", **options)
        return jnp.sum(result[0] if options.get("with_metrics") else result)

    with on(device), caplog.at_level(logging.INFO, "jaxchunk"):
        texts = [
            jax.jit(function).trace(*given).lower(lowering_platforms=("cuda",)).as_text()
            for function in (jax.value_and_grad(loss, (0, 1)), loss)
        ]
    for text in texts:
        assert "jaxchunk_exponentials" in text and "triton" in text
        assert "mosaic_gpu" not in text
    assert [has_array(text, 256, 1187) for text in texts] == [True, False]  # E, for gradients alone
    assert "by triton_gemm, TritonTiles(" in caplog.text and f"no table has an entry for {device}" in caplog.text


@without_wgmma
def test_it_takes_any_size_and_only_bfloat16(device):
    head = dispatch.Head(67, 1187, 0, RowOptions(1187))
    with on(device):
        assert dispatch.choose_implementation("fused", head=head).implementation == "fused"
        with pytest.raises(ValueError, match="it multiplies bfloat16 and the compute dtype is float32"):
            dispatch.choose_implementation("fused", head=head, compute_dtype="float32")


def test_no_kernels_are_chosen_for_a_gpu_before_ampere(monkeypatch):
    monkeypatch.setattr(dispatch, "_compute_capability", lambda: "7.5")
    head = dispatch.Head(64, 128, 0, RowOptions(128))
    obstacle = "it needs compute capability 8.0 and this device has 7.5"
    with on("NVIDIA T4"):
        assert dispatch.choose_implementation(head=head) == ("xla", f"pallas cannot run: {obstacle}")
        assert choose_elementwise(None, "bfloat16") == ("xla", f"pallas cannot run: {obstacle}")
        for named in ("pallas", "fused"):
            with pytest.raises(ValueError, match=obstacle):
                dispatch.choose_implementation(named, head=head)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("shape", [(500, 200, 5003), (1024, 896, 16384)], ids=str)
def test_exponentials_on_a_gpu(shape, options):
    given, options = operands(*shape), RowOptions(shape[2], **options)
    bias = jnp.linspace(-1.0, 1.0, shape[2])
    assert_kernel_as_plain(triton_gemm.exponentials, *given, bias, options)
