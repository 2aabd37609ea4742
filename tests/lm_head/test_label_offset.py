"""The fused LM head: its algorithm over a plain kernel on any JAX, and the Mosaic GPU kernel in JAX's interpreter."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec
from lm_head_oracle import (
    IGNORE,
    assert_as_exact,
    assert_close,
    assert_kernel_as_plain,
    has_array,
    oracle,
    problem,
    relative_error,
    same_dtype_baseline,
    value_and_grads,
)

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import dispatch
from jaxchunk.lm_head.kernels import xla
from jaxchunk.lm_head.rows import RowOptions

NEWEST = jax.version.__version_info__ >= (0, 11)
needs_mosaic = pytest.mark.skipif(not NEWEST, reason="Mosaic GPU has a CPU interpreter from JAX 0.11")
FUSED = ["fused_xla", pytest.param("fused_interpret", marks=needs_mosaic), pytest.param("fused", marks=pytest.mark.gpu)]
ON_CPU_AND_GPU = pytest.mark.parametrize("implementation", FUSED[::2])

T, D, V = 37, 32, 112
_keys = jax.random.split(jax.random.key(7), 3)
TOKEN_WEIGHTS = jnp.where(jax.random.uniform(_keys[0], (T,)) < 0.3, 0.0, jax.random.uniform(_keys[0], (T,)) + 0.5)
BIAS = jax.random.normal(_keys[1], (V,)).astype(jnp.bfloat16)
COTANGENT = jax.random.normal(_keys[2], (T,))
OPTION_SETS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "normalizer": {"normalizer": 17.0},
    "weights": {"token_weights": TOKEN_WEIGHTS},
    "z_loss and scale": {"z_loss": 1e-2, "logit_scale": 0.7},
    "smoothing": {"label_smoothing": 0.1, "logit_scale": 1.5},
    "softcap": {"logit_softcap": 2.0},
    "metrics": {"with_metrics": True},
    "bias": {"bias": BIAS},
    "many": {"bias": BIAS, "z_loss": 1e-2, "label_smoothing": 0.1, "token_weights": TOKEN_WEIGHTS, "logit_scale": 0.7,
             "with_metrics": True},
    "many with softcap": {"bias": BIAS, "z_loss": 1e-2, "logit_softcap": 3.0, "token_weights": TOKEN_WEIGHTS,
                          "logit_scale": 0.7, "with_metrics": True},
    "none": {"reduction": "none", "bias": BIAS, "z_loss": 1e-2, "token_weights": TOKEN_WEIGHTS, "logit_scale": 0.7},
}  # fmt: skip
INTERPRETED = ("none", "many with softcap")  # slow; `KERNEL_CASES` has all that an option does in the kernel


def check(p, implementation, cotangent=1.0, num_chunks=3, taken_twice=0, **options):
    how = {"num_chunks": num_chunks, "implementation": implementation}
    result = value_and_grads(p, cotangent, taken_twice=taken_twice, **how, **options)
    exact = oracle(p, cotangent, **options)
    assert_as_exact(result, exact, same_dtype_baseline(p, cotangent, **options), p.hidden.dtype)
    return result


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *[("fused_xla", name) for name in OPTION_SETS],
        *[pytest.param("fused_interpret", name, marks=needs_mosaic) for name in INTERPRETED],
        *[pytest.param("fused", name, marks=pytest.mark.gpu) for name in OPTION_SETS],
    ],
)
def test_every_option_is_as_exact_as_unchunked(implementation, name):
    options = OPTION_SETS[name]
    cotangent = COTANGENT if options.get("reduction") == "none" else 1.0
    check(problem(T, D, V, jnp.bfloat16), implementation, cotangent, **options)


@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("implementation", ["fused_xla"])
def test_in_float32_every_formula_is_right_to_the_last_digits(implementation, options):
    p = problem(T, D, V)
    options = options | {"bias": BIAS.astype(jnp.float32)} if "bias" in options else options
    cotangent = COTANGENT if options.get("reduction") == "none" else 1.0
    result = value_and_grads(p, cotangent, num_chunks=3, implementation=implementation, **options)
    assert_close(result, oracle(p, cotangent, **options), 3e-6)


@pytest.mark.parametrize("shape", [(1, 16, 16), (130, 80, 272), (257, 144, 528)], ids=str)
@pytest.mark.parametrize("num_chunks", [1, 2])
@ON_CPU_AND_GPU
def test_sizes_that_tiles_do_not_divide(implementation, num_chunks, shape):
    check(problem(*shape, jnp.bfloat16, ignored=0.0), implementation, num_chunks=num_chunks)


def with_margin(margin, T=16, D=64, V=112):
    """Labels whose logits stand about `margin` nats above (or below) all others, exactly representable."""
    p = problem(T, D, V, jnp.bfloat16, scale=0.1, ignored=0.0)
    labels = jnp.arange(T) % 8
    direction = jnp.zeros((T, D)).at[jnp.arange(T), labels].set(16.0)
    weight = p.weight.at[:, :8].set(0).at[jnp.arange(8), jnp.arange(8)].set(margin / 16)
    hidden = p.hidden.at[:, :8].set(0) + direction.astype(jnp.bfloat16)
    return p._replace(hidden=hidden, weight=weight, labels=labels)


@pytest.mark.parametrize("margin", [20.0, 30.0])
@pytest.mark.parametrize("implementation", FUSED)
def test_confident_labels(implementation, margin):
    p = with_margin(margin)
    result, exact = value_and_grads(p, num_chunks=2, implementation=implementation), oracle(p)
    assert 0 < exact.loss < 1e-6
    assert result.loss >= 0
    assert relative_error(result.loss, exact.loss) < 1e-5
    assert relative_error(result.d_hidden, exact.d_hidden) < 4e-3
    assert relative_error(result.d_weight, exact.d_weight) < 4e-3


@pytest.mark.parametrize("implementation", FUSED)
def test_confident_labels_have_a_tenth_of_the_error_of_bfloat16_logits(implementation):
    """Logits eight times those of initialisation, the largest the label's."""
    p = problem(128, 64, 1024, jnp.bfloat16, scale=8.0, ignored=0.0)
    p = p._replace(labels=jnp.argmax(p.hidden.astype(jnp.float32) @ p.weight.T.astype(jnp.float32), axis=1))
    exact, theirs = oracle(p), same_dtype_baseline(p)
    ours = value_and_grads(p, num_chunks=2, implementation=implementation)
    for name in ("d_hidden", "d_weight"):
        error, wanted = (relative_error(getattr(r, name), getattr(exact, name)) for r in (ours, theirs))
        assert error <= 0.1 * wanted


def some_far(margin):
    """Every other token of the second half has a loss of about `-margin` nats."""
    p = with_margin(margin)
    near = (jnp.arange(16) < 8) | (jnp.arange(16) % 2 == 0)
    usual = problem(16, 64, 8, jnp.bfloat16).hidden.at[:, :8].set(0)
    return p._replace(hidden=jnp.where(near[:, None], usual, p.hidden))


GREAT_LOSSES = [*itertools.product(("mean", "none"), (-85.0, -95.0, -200.0, -1000.0))]


@pytest.mark.parametrize(
    ("implementation", "reduction", "margin"),
    [
        *[("fused_xla", *case) for case in GREAT_LOSSES],
        *[pytest.param("fused_interpret", *case, marks=needs_mosaic) for case in GREAT_LOSSES[1::2]],
        *[pytest.param("fused", *case, marks=pytest.mark.gpu) for case in GREAT_LOSSES],
    ],
)
def test_tokens_of_a_great_loss(implementation, reduction, margin):
    """Their exponentials would overflow, or leave nothing of 1/s: they are taken again."""
    cotangent = jnp.linspace(1.0, 2.0, 16) if reduction == "none" else 1.0
    result = check(some_far(margin), implementation, cotangent, num_chunks=2, reduction=reduction)
    assert np.max(result.loss) > 0.2 * -margin


@pytest.mark.parametrize(("margin", "expected"), [(-80.0, 0), (-200.0, 4)])
@pytest.mark.parametrize("options", [{}, {"bias": BIAS, "label_smoothing": 0.1, "z_loss": 1e-3}], ids=["plain", "more"])
@ON_CPU_AND_GPU
def test_far_tokens_are_counted(implementation, options, margin, expected):
    p, options = some_far(margin), {"num_chunks": 2, "with_metrics": True, **options}
    check(p, implementation, taken_twice=expected, **options)
    assert lm_head_loss(*p, implementation=implementation, **options)[1].num_taken_twice == expected


@pytest.mark.parametrize("num_far", [1, 7, 40])
@pytest.mark.parametrize("implementation", ["fused_xla"])
def test_far_tokens_are_gone_through_in_blocks(implementation, num_far):
    """More of them than a chunk has rows, and fewer."""
    p = with_margin(-150.0, T=48)
    usual = problem(48, 64, 8, jnp.bfloat16).hidden.at[:, :8].set(0)
    p = p._replace(hidden=jnp.where((jnp.arange(48) * 31 % 48 < num_far)[:, None], p.hidden, usual))
    check(p, implementation, num_chunks=6)


@pytest.mark.parametrize("implementation", FUSED)
def test_ignored_rows_may_hold_nan_and_a_token_may_have_200_nats(implementation):
    p = with_margin(-200.0)
    labels = p.labels.at[3].set(IGNORE).at[11].set(IGNORE)
    p = p._replace(labels=labels)
    expected = oracle(p)
    result = value_and_grads(
        p._replace(hidden=p.hidden.at[3].set(jnp.nan).at[11].set(jnp.inf)), num_chunks=2, implementation=implementation
    )
    assert_as_exact(result, expected, same_dtype_baseline(p), jnp.bfloat16)
    assert np.all(result.d_hidden[[3, 11]] == 0)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
@pytest.mark.parametrize("implementation", ["fused_xla"])
def test_frozen_operands(implementation, frozen):
    p = problem(T, D, V, jnp.bfloat16)
    loss = lambda **o: lm_head_loss(**p._asdict() | o, num_chunks=3, implementation=implementation)  # noqa: E731
    name = {"hidden": "weight", "weight": "hidden"}[frozen]
    gradient = jax.jit(jax.grad(lambda a: loss(**{name: a})))(getattr(p, name))
    whole = value_and_grads(p, num_chunks=3, implementation=implementation)
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), getattr(whole, f"d_{name}"))


GPU_SHAPES = ((4096, 256), (32768, 256), (4096,))  # enough for the GEMMs that a training step has


@pytest.mark.parametrize(
    "implementation", ["fused_xla", pytest.param("fused", marks=[pytest.mark.gpu, pytest.mark.alone])]
)
def test_d_weight_and_exponentials_are_not_copied(implementation):
    shapes = GPU_SHAPES if implementation == "fused" else ((512, 64), (4096, 64), (512,))
    (T, D), (V, _), _ = shapes
    operands = [jax.ShapeDtypeStruct(s, t) for s, t in zip(shapes, ("bfloat16", "bfloat16", "int32"), strict=True)]
    loss = functools.partial(lm_head_loss, num_chunks=4, implementation=implementation)
    program = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*operands).compile()
    text = program.as_text()
    assert f"f32[{V},{D}]" in text and f"[{T // 4},{V}]" in text
    assert not re.findall(rf"= f32\[{V},{D}\]\S* (?:copy|transpose)\(", text)
    assert not re.findall(rf"= bf16\[{T // 4},{V}\]\S* (?:copy|transpose)\(", text)
    if implementation == "fused":  # XLA:CPU adds outside of its GEMMs, and has E in float32 too
        assert not re.findall(rf"= f32\[{V},{D}\]\S* add\(", text)
        # Once ahead of the loop, once in it, and once for what is set aside.
        assert len(re.findall(rf"= \(f32\[{V},{D}\]\S*, .* custom-call\(.*__cublas\$lt\$matmul", text)) == 3
        assert program.memory_analysis().temp_size_in_bytes < 1.2 * (T // 4 * V * 2) + V * D * 4 + 64 * 2**20


@ON_CPU_AND_GPU
def test_the_same_result_twice(implementation):
    """To the last bit, with labels that many tokens share: no atomics."""
    p = problem(*((4096, 256, 32768) if implementation == "fused" else (512, 64, 4096)), jnp.bfloat16)
    p = p._replace(labels=jnp.where(p.labels == IGNORE, IGNORE, p.labels % 50))
    loss = functools.partial(lm_head_loss, num_chunks=4, implementation=implementation)
    gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))
    once = gradients(*p)
    for _ in range(5):
        jax.tree.map(np.testing.assert_array_equal, gradients(*p), once)


@pytest.mark.parametrize("axes", [{"token_axis": "a"}, {"vocab_axis": "a"}], ids=str)
def test_sharded(axes):
    if len(jax.devices()) < 2:
        pytest.skip("needs several devices")
    mesh = jax.make_mesh((2,), ("a",), axis_types=(AxisType.Auto,))
    p = problem(2 * T, D, V, jnp.bfloat16)
    weight_spec = PartitionSpec("a" if "vocab_axis" in axes else None)
    token_spec = PartitionSpec("a" if "token_axis" in axes else None)
    options = {"bias": BIAS, "z_loss": 1e-2, "label_smoothing": 0.1}

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(token_spec, weight_spec, token_spec, weight_spec), out_specs=PartitionSpec()
    )
    def loss(hidden, weight, labels, bias):
        o = options | {"bias": bias}
        return lm_head_loss(hidden, weight, labels, num_chunks=2, implementation="fused_xla", **o, **axes)

    value, (dx, dW, db) = jax.jit(jax.value_and_grad(loss, (0, 1, 3)))(*p, BIAS)
    exact, baseline = oracle(p, **options), same_dtype_baseline(p, **options)
    result = exact._replace(loss=value, d_hidden=dx, d_weight=dW, d_bias=db)
    assert_as_exact(result, exact, baseline, jnp.bfloat16)


KERNEL_CONFIGS = {
    "cooperative, rows": {},
    "cooperative, columns": {"split": "n"},
    "wide tiles": {"tile_m": 64, "tile_n": 256},
    "tiles of 192 columns": {"tile_n": 192, "stages": 3},
    "pingpong": {"schedule": "pingpong", "stages": 6},
    "pingpong, wide tiles": {"schedule": "pingpong", "tile_m": 64, "tile_n": 256, "stages": 3},
    "two slots, long steps": {"tile_n": 64, "tile_k": 128, "stages": 2, "store_n": 32, "store_slots": 2},
    "cluster along rows": {"cluster": "m"},
    "pingpong, cluster along columns": {"schedule": "pingpong", "stages": 5, "cluster": "n"},
    "along columns": {"grid_minor": "n", "grid_width": 3},
    "cooperative, columns, cluster along rows": {"split": "n", "cluster": "m", "store_n": 128, "stages": 3},
}


# Every option of the kernel, alone or with others, at sizes that tiles do not divide.
KERNEL_CASES = {
    "plain": ((8, 16, 16), False, {}),
    "scale, bias": ((136, 80, 272), True, {"logit_scale": 0.7}),
    "softcap": ((264, 144, 528), False, {"softcap": 3.0}),
    "metrics": ((72, 48, 304), False, {"metrics": True}),
    "all": ((128, 64, 256), True, {"logit_scale": 0.7, "softcap": 3.0, "metrics": True}),
}


INTERPRETED_AND_ON_A_GPU = pytest.mark.parametrize(
    "interpret", [pytest.param(True, marks=needs_mosaic), pytest.param(False, marks=pytest.mark.gpu)]
)


@INTERPRETED_AND_ON_A_GPU
@pytest.mark.parametrize(("shape", "has_bias", "options"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_every_option_of_the_kernel(shape, has_bias, options, interpret):
    check_kernel(shape, has_bias, options, {}, interpret)


@INTERPRETED_AND_ON_A_GPU
@pytest.mark.parametrize("settings", KERNEL_CONFIGS.values(), ids=KERNEL_CONFIGS.keys())
def test_every_schedule_of_the_kernel(settings, interpret):
    # In the interpreter the options' cases leave E out too, in both schedules: a whole program each.
    check_kernel((200, 208, 848), True, {"metrics": True}, settings, interpret, unstored=not interpret)


@INTERPRETED_AND_ON_A_GPU
@pytest.mark.parametrize("name", ["softcap", "all"])
def test_options_of_the_kernel_in_pingpong(name, interpret):
    check_kernel(*KERNEL_CASES[name], KERNEL_CONFIGS["pingpong"], interpret)


@pytest.mark.parametrize(("shape", "has_bias", "options"), KERNEL_CASES.values(), ids=KERNEL_CASES.keys())
def test_the_plain_kernel_may_leave_out_exponentials(shape, has_bias, options):
    assert_kernel_as_plain(xla.exponentials, *kernel_operands(shape, has_bias, options))


def kernel_operands(shape, has_bias, options):
    (C, _, V), p = shape, problem(*shape, jnp.bfloat16)
    labels = jnp.where(p.labels == IGNORE, -1, p.labels)
    offset = jnp.where(labels >= 0, jnp.linspace(-3.0, 3.0, C), jnp.inf)
    bias = jnp.linspace(-1.0, 1.0, V) if has_bias else None
    return p.hidden, p.weight, offset, labels, bias, RowOptions(V, **options)


def check_kernel(shape, has_bias, options, settings, interpret, unstored=True):
    if not (interpret or dispatch.is_hopper()):
        pytest.skip("it needs a Hopper GPU and JAX 0.11")
    from jaxchunk.lm_head.kernels import mosaic

    kernel = functools.partial(mosaic.exponentials, config=mosaic.MosaicConfig(**settings), interpret=interpret)
    assert_kernel_as_plain(kernel, *kernel_operands(shape, has_bias, options), unstored=unstored)


def on_hopper():
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


@needs_mosaic
@pytest.mark.parametrize("settings", KERNEL_CONFIGS.values(), ids=KERNEL_CONFIGS.keys())
def test_every_schedule_lowers_for_cuda_without_a_gpu(settings):
    check_that_the_kernel_lowers(8192, 896, 151936, settings)


@needs_mosaic
@pytest.mark.parametrize("V", [16, 1184, 1200, 1216])
@pytest.mark.parametrize("options", [{}, {"softcap": 30.0, "metrics": True}], ids=str)
def test_the_kernel_lowers_at_sizes_that_tiles_do_not_divide(options, V):
    check_that_the_kernel_lowers(256, 80, V, {}, **options)


def check_that_the_kernel_lowers(C, D, V, settings, **options):
    from jaxchunk.lm_head.kernels import mosaic

    shapes, dtypes = ((C, D), (V, D), (C,), (C,)), ("bfloat16", "bfloat16", "float32", "int32")
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    config = mosaic.MosaicConfig(**settings)
    kernel = functools.partial(mosaic.exponentials, bias=None, options=RowOptions(V, **options), config=config)
    for store in (True, False):
        text = lowered_for_hopper(functools.partial(kernel, store=store), *operands)
        assert text.count("custom_call @mosaic_gpu") == 1
        assert has_array(text, C, V) == store


def lowered_for_hopper(function, *operands):
    with on_hopper():
        return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


@needs_mosaic
@pytest.mark.parametrize("options", [{"logit_softcap": 30.0, "with_metrics": True}, {"reduction": "none"}], ids=str)
def test_the_loss_lowers_for_cuda_without_a_gpu_and_keeps_exponentials_for_gradients_alone(options):
    shapes, dtypes = ((500, 80), (1200, 80), (500,)), ("bfloat16", "float32", "int32")
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]

    def loss(*xs):
        result = lm_head_loss(*xs, num_chunks=2, implementation="fused", **options)
        return jnp.sum(result[0] if options.get("with_metrics") else result)

    for function, has_gradients in ((jax.value_and_grad(loss, (0, 1)), True), (loss, False)):
        text = lowered_for_hopper(function, *operands)
        assert "mosaic_gpu" in text
        assert has_array(text, 256, 1200) == has_gradients


@needs_mosaic
@pytest.mark.parametrize("axes", [{"token_axis": "a"}, {"vocab_axis": "a"}, {"token_axis": "a", "vocab_axis": "b"}])
def test_the_loss_lowers_for_cuda_over_a_mesh(axes):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 2), ("a", "b"), (AxisType.Auto,) * 2, abstract_device=device)
    shapes, dtypes = ((512, 64), (1184, 64), (512,)), ("bfloat16", "float32", "int32")
    operands = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    loss = functools.partial(lm_head_loss, num_chunks=2, implementation="fused", **axes)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    kernels = 4  # for the first chunk, for the others, and two for what is set aside
    assert text.count("@mosaic_gpu") == kernels


@needs_mosaic
def test_what_is_chosen_and_why():
    plain = dispatch.Head(64, 1184, 0, RowOptions(1184))
    with on_hopper():
        assert dispatch.choose_implementation(head=plain) == ("fused", "the device is a Hopper GPU")
        assert dispatch.choose_implementation("fused", head=plain).implementation == "fused"
        for head, dtype, reason in (
            (plain._replace(columns=1187), "bfloat16", "multiples of 16"),
            (plain._replace(vocab_dim=1), "bfloat16", "weight_layout"),
            (plain._replace(options=RowOptions(1184, softcap=3.0, label_smoothing=0.1)), "bfloat16", "smoothing"),
            (plain, "float32", "float32"),
        ):
            with pytest.raises(ValueError, match=reason):
                dispatch.choose_implementation("fused", head=head, compute_dtype=dtype)
            choice = dispatch.choose_implementation(head=head, compute_dtype=dtype)
            assert choice.implementation == "pallas" and reason in choice.reason


def test_the_kernel_cannot_run_on_a_cpu_and_says_so():
    with pytest.raises(ValueError, match=r"'fused' cannot run: it needs an NVIDIA GPU"):
        lm_head_loss(*problem(T, D, V, jnp.bfloat16), implementation="fused")
