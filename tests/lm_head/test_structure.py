"""What the compiler makes of the loss: GEMM count, the loop, memory, and lowering for a GPU that is not here."""

import collections
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AbstractDevice, AbstractMesh

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import rows
from jaxchunk.lm_head.kernels import triton, xla
from jaxchunk.lm_head.rows import RowOptions, RowStatistics

T, D, V = 512, 64, 4096
X, W, Y = (
    jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in (((T, D), "float32"), ((V, D), "float32"), ((T,), "int32"))
)


def compiled(argnums=None, *, operands=(X, W, Y), **options):
    def loss(hidden, weight, labels):
        return lm_head_loss(hidden, weight, labels, **options)

    function = loss if argnums is None else jax.value_and_grad(loss, argnums)
    return jax.jit(function).lower(*operands).compile()


def gemms(text: str) -> int:
    return len(re.findall(r"= \S+ (?:dot\(|custom-call\(.*(?:cublas|gemm|matmul))", text))


def loop_body(text: str) -> str:
    """The HLO of the one while loop's body with everything it calls."""
    computations = dict(re.findall(r"^(?:ENTRY )?(%\S+) .*?\{\n(.*?)^\}", text, re.M | re.S))
    (body,) = re.findall(r" while\(.*body=(%[\w.\-]+)", text)
    found, queue = [], [body]
    while queue:
        name = queue.pop()
        found.append(computations[name])
        queue += [c for c in re.findall(r"(?:calls|to_apply)=(%[\w.\-]+)", computations[name]) if c in computations]
    return "\n".join(found)


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize(
    ("argnums", "expected"), [(None, 1), (0, 2), (1, 2), ((0, 1), 3)], ids=["loss", "frozen W", "frozen x", "both"]
)
def test_no_gemm_is_run_for_nothing(argnums, expected, num_chunks):
    assert gemms(compiled(argnums, num_chunks=num_chunks, implementation="xla").as_text()) == expected


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def traced(argnums, hidden_dtype="float32", **options):
    hidden = jax.ShapeDtypeStruct((T, D), hidden_dtype)
    options = {"num_chunks": 4, "implementation": "xla"} | options
    gradients = jax.grad(lambda *xs: lm_head_loss(*xs, **options), argnums)
    return list(equations(jax.make_jaxpr(gradients)(hidden, W, Y).jaxpr))


@pytest.mark.parametrize(
    ("hidden_dtype", "options", "operands", "outputs"),
    [
        ("float32", {}, "float32", ("float32", "float32", "float32")),
        ("bfloat16", {}, "bfloat16", ("bfloat16", "bfloat16", "float32")),
        ("float32", {"compute_dtype": "bfloat16"}, "bfloat16", ("bfloat16", "float32", "float32")),
        ("bfloat16", {"accum_dtype": "bfloat16"}, "bfloat16", ("bfloat16", "bfloat16", "bfloat16")),
    ],
)
def test_the_precision_of_every_gemm(hidden_dtype, options, operands, outputs):
    """What the compiler is asked for; a CPU would hide most departures from it."""
    shapes = {(T // 4, V): "logits", (T // 4, D): "dX", (V, D): "dW"}
    dtypes = dict(zip(("logits", "dX", "dW"), outputs, strict=True))
    for argnums, expected in (((0, 1), {"logits", "dX", "dW"}), (0, {"logits", "dX"}), (1, {"logits", "dW"})):
        gemms = [e for e in traced(argnums, hidden_dtype, **options) if e.primitive.name == "dot_general"]
        found = {shapes[e.outvars[0].aval.shape]: e for e in gemms}
        assert set(found) == expected and len(gemms) == len(expected)
        for name, gemm in found.items():
            assert gemm.outvars[0].aval.dtype == dtypes[name], name
            assert {v.aval.dtype.name for v in gemm.invars} == {operands}, name
            exact = gemm.params["precision"]
            assert (exact is not None and set(exact) == {jax.lax.Precision.HIGHEST}) == (operands == "float32"), name


def test_the_weight_is_cast_once_and_not_in_the_loop():
    (scan,) = [e for e in traced((0, 1), "bfloat16") if e.primitive.name == "scan"]
    body = list(equations(scan.params["jaxpr"].jaxpr))
    assert not [e for e in body if e.primitive.name == "convert_element_type" and e.outvars[0].aval.shape == (V, D)]


def operations_on(shape, **options):
    """How often the plain call's program has each arithmetic operation with a result of this shape."""
    names = [e.primitive.name for e in traced((0, 1), **options) if getattr(e.outvars[0].aval, "shape", None) == shape]
    others = {"jit", "iota", "broadcast_in_dim", "masked_load", "masked_swap"}
    return collections.Counter(name for name in names if name not in others)


def test_options_that_are_off_cost_nothing():
    """The program holds what the arithmetic of `rows.py` needs and nothing else of the size of the logits."""
    assert operations_on((T // 4, V), implementation="xla") == {
        "dot_general": 1,  # z
        "eq": 2, "select_n": 2,  # the label's column, out of the sum and in dz
        "sub": 2, "exp": 2,  # exp(z - m), exp(z - shift)
        "mul": 1,  # * factor
    }  # fmt: skip
    assert operations_on((2048,), implementation="pallas_interpret") == {
        "add": 4, "eq": 2, "select_n": 3, "sub": 3, "abs": 1, "neg": 1, "exp": 3, "gt": 1, "mul": 3, "max": 1,
    }  # fmt: skip
    off = {"token_weights": None, "bias": None, "label_smoothing": 0.0, "z_loss": 0.0, "logit_softcap": None}
    off |= {"logit_scale": 1.0, "weight_layout": "vd", "with_metrics": False, "token_axis": None, "vocab_axis": None}
    named, unnamed = (compiled((0, 1), num_chunks=4, **options).as_text() for options in (off, {}))
    assert named == unnamed


@pytest.mark.parametrize(
    ("argnums", "expected"), [(None, 1), (0, 3), (1, 3), ((0, 1), 4)], ids=["loss", "frozen W", "frozen x", "both"]
)
def test_per_token_losses_compute_the_logits_again_and_no_gemm_for_nothing(argnums, expected):
    def loss(hidden, weight, labels):
        return jnp.sum(lm_head_loss(hidden, weight, labels, num_chunks=4, implementation="xla", reduction="none"))

    function = loss if argnums is None else jax.value_and_grad(loss, argnums)
    assert gemms(jax.jit(function).lower(X, W, Y).compile().as_text()) == expected


def test_one_function_may_be_differentiated_for_one_operand_after_the_other():
    """JAX keeps one structure of residuals for all derivatives of a jitted program."""
    operands = jax.random.normal(jax.random.key(0), (12, 8)), jax.random.normal(jax.random.key(1), (97, 8))
    labels, bias = jnp.arange(12), jnp.zeros(97)
    for reduction in ("mean", "none"):

        @jax.jit
        def loss(hidden, weight, bias, labels=labels, reduction=reduction):
            total, metrics = lm_head_loss(
                hidden, weight, labels, bias=bias, num_chunks=2, reduction=reduction, with_metrics=True
            )
            return jnp.sum(total), metrics

        every = jax.grad(loss, (0, 1, 2), has_aux=True)(*operands, bias)[0]
        for argnums in ((0,), (1,), (2,), (1, 2), (0, 1, 2)):
            found = jax.grad(loss, argnums, has_aux=True)(*operands, bias)[0]
            for gradient, argnum in zip(found, argnums, strict=True):
                np.testing.assert_allclose(gradient, every[argnum], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("num_chunks", [3, 7, 100, 500])
def test_there_are_never_more_chunks_than_asked_for(num_chunks):
    (scan,) = [e for e in traced((0, 1), num_chunks=num_chunks) if e.primitive.name == "scan"]
    assert scan.params["length"] <= num_chunks


def test_a_named_implementation_is_the_one_that_runs():
    def kernels(implementation):
        return [e for e in traced((0, 1), implementation=implementation) if e.primitive.name == "pallas_call"]

    assert len(kernels("pallas_interpret")) == 1
    assert len(kernels("xla")) == 0


@pytest.mark.parametrize(("V", "block"), [(97, 64), (97, 32), (128, 64), (1187, 1024)])
def test_the_row_kernel_is_right_in_place(V, block):
    """The interpreter gives the kernel separate buffers; on a GPU the gradient is written over the logits."""
    logits = jax.random.normal(jax.random.key(0), (6, V))
    labels = jnp.array([0, V - 1, -1, block - 1, V - block, block // 2])
    options = RowOptions(V, softcap=5.0)
    config = triton.RowKernelConfig(block=block)
    kernel = functools.partial(
        triton._both_passes_kernel, row=triton._Row.of(V, config, options, has_bias=False, exact=True, interpret=True)
    )

    def in_place(z_ref, y_ref, w_ref, m_ref, n_ref, z_y_ref, dz_ref):
        dz_ref[...] = z_ref[...]
        kernel(dz_ref, y_ref, w_ref, m_ref, n_ref, z_y_ref, dz_ref)

    per_row, row = pl.BlockSpec((1,), lambda t: (t,)), pl.BlockSpec((None, V), lambda t: (t, 0))
    shapes = [*[jax.ShapeDtypeStruct((6,), jnp.float32)] * 3, jax.ShapeDtypeStruct((6, V), jnp.float32)]
    specs = {"in_specs": [row, per_row, per_row], "out_specs": [per_row, per_row, per_row, row]}
    ours = pl.pallas_call(in_place, grid=(6,), out_shape=shapes, interpret=True, **specs)(logits, labels, jnp.ones(6))
    statistics, gradients = xla.statistics_and_gradients(logits, labels, jnp.ones(6), None, options)
    expected = rows.results(statistics, options).loss, gradients
    for value, wanted in zip((rows.results(RowStatistics(*ours[:3]), options).loss, ours[3]), expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-6)


def test_chunks_stay_a_loop_and_one_chunk_has_none():
    assert len(re.findall(r" while\(", compiled((0, 1), num_chunks=1).as_text())) == 0
    for num_chunks in (2, 4, 16):
        text = compiled((0, 1), num_chunks=num_chunks).as_text()
        assert len(re.findall(r" while\(", text)) == 1
        assert f'"known_trip_count":{{"n":"{num_chunks}"}}' in text


@pytest.mark.parametrize("num_chunks", [2, 4])
def test_the_loop_does_not_copy_d_weight(num_chunks):
    body = loop_body(compiled((0, 1), num_chunks=num_chunks).as_text())
    assert f"f32[{V},{D}]" in body  # the carry is there,
    assert not re.findall(rf"= f32\[{V},{D}\]\S* copy\(", body)  # and is not copied
    assert not re.findall(rf"= f32\[{D},{V}\]\S* (?:copy|transpose)\(", body)


def test_temporary_memory_falls_with_chunks():
    temporaries = [
        compiled((0, 1), num_chunks=n, implementation="xla").memory_analysis().temp_size_in_bytes for n in (1, 2, 4, 8)
    ]
    logits = T * V * 4
    assert temporaries[0] >= logits
    for before, after in itertools.pairwise(temporaries):
        assert after < 0.6 * before


def test_a_cotangent_of_one_folds_away():
    """`value_and_grad` of the bare loss must not multiply the V x D gradient once more; a scaled loss has to."""
    multiply = rf"= f32\[{V},{D}\]\S* multiply\("

    def scaled_gradients(scale):
        loss = lambda *xs: scale * lm_head_loss(*xs, num_chunks=4)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss, (0, 1))).lower(X, W, Y).compile().as_text()

    assert not re.findall(multiply, scaled_gradients(1.0))
    assert re.findall(multiply, scaled_gradients(3.0))


def reads_once(device_kind, vocab_size, dtype):
    """Whether there is a row kernel that does (`test_mosaic_rows.py`)."""
    is_hopper = device_kind == "NVIDIA H200" and jax.version.__version_info__ >= (0, 11)
    return is_hopper and vocab_size % 8 == 0 and dtype == jnp.bfloat16


def row_kernels(text):
    return text.count("__gpu$xla.gpu.triton"), text.count("@mosaic_gpu")


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("vocab_size", [151936, 1187, 97, 1])
@pytest.mark.parametrize("device_kind", ["NVIDIA H200", "NVIDIA GB10", "NVIDIA GeForce RTX 4090"])
def test_pallas_lowers_for_cuda_without_a_gpu(device_kind, vocab_size, dtype, num_chunks):
    device = AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    operands = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((16384, 896), dtype), ((vocab_size, 896), jnp.float32), ((16384,), jnp.int32))
    )
    loss = lambda *xs: lm_head_loss(*xs, num_chunks=num_chunks, implementation="pallas")  # noqa: E731
    gradients = jax.value_and_grad(loss, (0, 1))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(gradients).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.dot_general") == 3
    assert row_kernels(text) == ((0, 1) if reads_once(device_kind, vocab_size, dtype) else (1, 0))
    assert "output_operand_alias" in text  # dlogits take the place of the logits


OPTION_SETS = {
    "all": {"logit_softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1, "logit_scale": 0.5, "with_metrics": True},
    "bounded": {"logit_softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1},
    "per token": {"logit_softcap": 50.0, "reduction": "none"},
}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("options", OPTION_SETS.values(), ids=OPTION_SETS.keys())
def test_every_option_lowers_for_cuda_without_a_gpu(options, dtype):
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    shapes, dtypes = ((512, 64), (1187, 64), (512,), (1187,)), (dtype, dtype, "int32", "float32")
    operands = tuple(jax.ShapeDtypeStruct(shape, t) for shape, t in zip(shapes, dtypes, strict=True))

    def loss(hidden, weight, labels, bias):
        result = lm_head_loss(hidden, weight, labels, bias=bias, num_chunks=2, **options)
        loss, aux = result if options.get("with_metrics") else (result, None)
        return jnp.sum(loss), aux

    gradients = jax.value_and_grad(loss, (0, 1, 3), has_aux=True)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(gradients).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    per_token = options.get("reduction") == "none"
    assert text.count("stablehlo.dot_general") == (4 if per_token else 3)
    assert text.count("__gpu$xla.gpu.triton") == (2 if per_token else 1)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_on_a_gpu_d_weight_accumulates_inside_the_gemm_and_dlogits_replace_logits(implementation):
    T, D, V, num_chunks = 4096, 256, 32768, 4
    operands = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((T, D), jnp.bfloat16), ((V, D), jnp.bfloat16), ((T,), jnp.int32))
    )
    program = compiled((0, 1), operands=operands, num_chunks=num_chunks, implementation=implementation)
    body = loop_body(program.as_text())
    assert not re.findall(rf"= f32\[{V},{D}\]\S* (?:copy|add|fusion|transpose)\(", body)
    assert len(re.findall(rf"= \(f32\[{V},{D}\]\S*, .* custom-call\(.*__cublas\$lt\$matmul", body)) == 1
    # XLA:GPU (JAX 0.11.2) does not let its own fusion write over the logits, so `xla` holds two sets of them.
    logits = (1 if implementation == "pallas" else 2) * T // num_chunks * V * 2
    dW = V * D * 4
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * logits + dW + 64 * 2**20


@pytest.mark.gpu
def test_gpu_and_cpu_agree():
    keys = jax.random.split(jax.random.key(0), 3)
    operands = (
        jax.random.normal(keys[0], (100, 64)),
        jax.random.normal(keys[1], (1187, 64)) / 8,
        jax.random.randint(keys[2], (100,), 0, 1187),
    )
    on_gpu = jax.grad(lambda *xs: lm_head_loss(*xs, num_chunks=3, implementation="pallas"), (0, 1))(*operands)
    with jax.default_device(jax.devices("cpu")[0]):
        host = jax.device_put(operands, jax.devices("cpu")[0])
        on_cpu = jax.grad(lambda *xs: lm_head_loss(*xs, num_chunks=3, implementation="xla"), (0, 1))(*host)
    for a, b in zip(on_gpu, on_cpu, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
