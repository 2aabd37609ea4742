"""The row kernel that reads logits once, in JAX's Mosaic GPU interpreter against float64; lowered; and on a GPU."""

import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import dispatch, rows
from jaxchunk.lm_head.kernels import triton, xla
from jaxchunk.lm_head.rows import RowOptions

NEWEST = jax.version.__version_info__ >= (0, 11)
pytestmark = pytest.mark.skipif(not NEWEST, reason="the kernel needs Mosaic GPU as JAX 0.11 has it")
if NEWEST:
    from jaxchunk.lm_head.kernels import mosaic_rows
    from jaxchunk.lm_head.kernels.mosaic_rows import MosaicRowsConfig

OPTION_SETS = {
    "plain": {},
    "smoothing and z_loss": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "all": {"softcap": 30.0, "z_loss": 1e-3, "label_smoothing": 0.1, "logit_scale": 0.7, "metrics": True},
}


def logits_of(C, V, scale=4.0):
    return (jax.random.normal(jax.random.key(C + V), (C, V)) * scale).astype(jnp.bfloat16)


def check(raw, labels, config=None, interpret=True, **options):
    """Statistics by what they say of the row, gradients within the rounding of bfloat16."""
    C, V = raw.shape
    options, weight = RowOptions(V, **options), jnp.where(labels < 0, 0.0, jnp.linspace(0.5, 2.0, C))
    kernel = jax.jit(
        functools.partial(mosaic_rows.statistics_and_gradients, bias=None, options=options, config=config,
                          interpret=interpret), donate_argnums=0,
    )  # fmt: skip
    with jax.enable_x64(True):
        exactly = jax.jit(functools.partial(xla.statistics_and_gradients, bias=None, options=options))
        exact = exactly(raw.astype(jnp.float64), labels, weight)
        exact = jax.tree.map(np.asarray, (rows.results(exact[0], options), *exact))
    statistics, gradients = kernel(raw + 0, labels, weight)
    results = rows.results(statistics, options)
    for name, value, wanted in zip(results._fields, results, exact[0], strict=True):
        if value is not None:
            np.testing.assert_allclose(value, wanted, rtol=2e-5, atol=2e-6, err_msg=name)
    for name in ("z_y", "z_sum") + (("m", "n", "q") if options.metrics else ()):
        if getattr(statistics, name) is not None:
            wanted = getattr(exact[1], name)
            np.testing.assert_allclose(getattr(statistics, name), wanted, rtol=2e-5, atol=1e-2 + 4e-7 * V, err_msg=name)
    assert np.all(statistics.n >= 1) or V == 1
    cancelled = 4e-6 * options.label_smoothing / V  # what rounding leaves where a softmax entry is about eps / V
    atol = 1e-30 + 3e-7 * bool(options.softcap) + cancelled
    np.testing.assert_allclose(np.float64(gradients), exact[2], rtol=2.0**-8, atol=atol)
    return statistics, gradients


@pytest.mark.parametrize(("cluster", "options"), [(1, "plain"), (2, "smoothing and z_loss"), (1, "all"), (2, "all")])
def test_labels_at_the_borders_of_pieces_and_ragged_rows(cluster, options):
    V, piece = 1672, 512
    labels = jnp.array([0, 511, -1, 512, 1023, 1535, 1536, V - 1, 700])
    check(logits_of(9, V), labels, MosaicRowsConfig(piece, slots=5, stores=2, cluster=cluster), **OPTION_SETS[options])


@pytest.mark.parametrize(
    ("V", "config"),
    [
        (8, {"piece": 512, "slots": 3, "stores": 1}),  # a piece that is nearly all beyond the row, three rows at once
        (2048, {"piece": 1024, "slots": 9, "stores": 4}),  # pieces that divide the row, four rows at once
        (1032, {"piece": 512, "slots": 3, "stores": 1}),  # a row fills the ring
        (3600, {"piece": 512, "slots": 4, "stores": 3, "cluster": 4}),  # blocks have 2 pieces
    ],
)
def test_rows_and_rings_of_any_size(V, config):
    labels = jnp.array([V - 1, 3, -1, V // 2, 0, 7, V // 3])
    check(logits_of(7, V), labels, MosaicRowsConfig(**config))


def test_logits_of_any_size_and_labels_that_lead_or_trail():
    V = 1048
    raw = logits_of(8, V, 1.0)
    raw = raw.at[0].add(3e4).at[1].add(-3e4).at[2].set(-jnp.inf).at[2, 5].set(2.0)
    labels = jnp.array([1, 2, 3, 600, 600, 600, 600, 600])
    raw = raw.at[2, 3].set(1.0).at[3].set(0.25)
    raw = raw.at[jnp.arange(4, 8), 600].set(jnp.array([30.0, -30.0, 80.0, -300.0], jnp.bfloat16))
    raw = raw.at[4, 1047].set(-jnp.inf)
    statistics, _ = check(raw, labels, MosaicRowsConfig(512, slots=4, stores=2, cluster=2))
    loss = rows.results(statistics, RowOptions(V)).loss
    assert 0 < loss[6] < 1e-30 and loss[7] > 300


def test_a_row_whose_label_is_the_only_finite_column():
    raw = jnp.full((1, 520), -jnp.inf, jnp.bfloat16).at[0, 517].set(3.0)
    labels, weight = jnp.array([517]), jnp.ones(1)
    kernel = functools.partial(mosaic_rows.statistics_and_gradients, interpret=True)
    statistics, gradients = kernel(raw, labels, weight, None, RowOptions(520))
    assert statistics.n == 0 and np.all(gradients == 0)


def test_a_configuration_that_does_not_fit_is_refused():
    for refused in (
        {"piece": 512, "slots": 3, "stores": 3},  # the ring
        {"piece": 8192, "slots": 28},  # shared memory
        {"piece": 512, "slots": 8, "cluster": 4},  # a block without a piece
        {"piece": 520, "slots": 8},
    ):
        config = MosaicRowsConfig(**refused)
        with pytest.raises(ValueError, match="does not fit rows of 1032 columns"):
            mosaic_rows.statistics_and_gradients(
                logits_of(1, 1032), jnp.array([1]), jnp.ones(1), None, RowOptions(1032), config=config
            )


@pytest.mark.parametrize(
    ("V", "cluster"),
    [(8, 1), (32000, 1), (81920, 1), (81928, 2), (128256, 2), (151936, 2), (262144, 4), (700000, None)],
)
def test_the_configuration_for_any_vocabulary(V, cluster):
    config = mosaic_rows.choose_config(V)
    assert (config and config.cluster) == cluster
    if config is not None:
        assert config.shared_memory_bytes <= mosaic_rows.SHARED_MEMORY_BYTES
        pieces = -(-V // (config.piece * config.cluster))
        assert pieces * 4 <= config.slots * 3  # a quarter of the ring is left for rows that follow
        assert config.piece == 8192 or config.piece >= V


def lowered(axes=(1,), V=151936, dtype=jnp.bfloat16, **options):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh(axes, ("data", "model")[: len(axes)], (AxisType.Auto,) * len(axes), abstract_device=device)
    shapes, dtypes = ((512, 64), (V, 64), (512,)), (dtype, jnp.float32, jnp.int32)
    operands = [jax.ShapeDtypeStruct(*operand) for operand in zip(shapes, dtypes, strict=True)]
    loss = lambda *xs: lm_head_loss(*xs, num_chunks=2, implementation="pallas", **options)  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh):
        gradients = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*operands)
        return gradients.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1, "logit_scale": 0.5},
        {"axes": (2,), "token_axis": "data"},
    ],
    ids=["plain", "options", "over a mesh"],
)
def test_the_loss_lowers_for_cuda_and_its_logits_are_overwritten_in_place(options):
    text = lowered(**options)
    rows_of_chunk = 128 if "token_axis" in options else 256
    logits = rf"tensor<{rows_of_chunk}x151936xbf16>"
    (call,) = re.findall(r"\n.*@mosaic_gpu.*", text)
    assert "output_tuple_indices = [1], operand_index = 0," in call and logits in call
    assert "gpu.triton" not in text and text.count("stablehlo.dot_general") == 3
    made = [line.split("stablehlo.")[1].split()[0] for line in text.splitlines() if re.search(rf" -> .*{logits}", line)]
    assert made == ["dot_general", "custom_call"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": jnp.float32}, "logits are float32"),
        ({"V": 1187}, "V is 1187 and must be a multiple of 8"),
        ({"V": 700000}, "a row of 700000 columns is more than"),
        ({"bias": jnp.zeros(151936)}, "it adds no bias"),
        ({"axes": (1, 2), "vocab_axis": "model"}, None),  # two kernels with a sum between them
    ],
)
def test_what_it_cannot_do_is_done_by_triton_and_said(options, reason, caplog):
    dispatch._log_row_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "jaxchunk"):
        text = lowered(**options)
    assert "@mosaic_gpu" not in text and text.count("gpu.triton") == (1 if reason else 2)
    assert any(reason in message for message in caplog.messages) if reason else "Mosaic" not in caplog.text


GPU_ROWS = [(300, 151936), (300, 128256), (1031, 32000), (140, 262144), (133, 4104), (3, 1000)]


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize(("C", "V"), GPU_ROWS)
def test_on_a_gpu_it_is_as_exact_as_float64(C, V, options):
    labels = jax.random.randint(jax.random.key(0), (C,), -1, V).at[0].set(V - 1).at[1].set(4095 % V)
    check(logits_of(C, V), labels, interpret=False, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("V", [151936, 128256])
def test_on_a_gpu_it_agrees_with_triton_over_many_rows(V):
    """Parts of a row meet in memory: several times, for what is read too soon is so only now and then."""
    C, options = 8192, RowOptions(V)
    raw, labels, weight = logits_of(C, V), jax.random.randint(jax.random.key(0), (C,), 0, V), jnp.ones(C)
    ours, theirs = (
        jax.jit(functools.partial(module.statistics_and_gradients, bias=None, options=options))
        for module in (mosaic_rows, triton)
    )
    difference = jax.jit(
        lambda a, b: jnp.max(jnp.abs(a.astype(jnp.float32) - b) / (jnp.abs(b.astype(jnp.float32)) + 1e-30))
    )
    for shift in range(5):
        shifted = jnp.roll(raw, 1000 * shift, axis=1)  # other numbers lie where the last ones lay
        (s, gradients), (expected_s, expected) = (kernel(shifted, labels, weight) for kernel in (ours, theirs))
        np.testing.assert_allclose(*(rows.results(x, options).loss for x in (s, expected_s)), rtol=1e-5)
        assert difference(gradients, expected) <= 2.0**-6.9
