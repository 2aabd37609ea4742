"""The microbenchmark's workload: its arithmetic, its programs, and the proof that chunks survive."""

import itertools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxchunk.bench import softmax_workload
from jaxchunk.bench.hlo import softmax_kernels, softmax_survived, surviving_chunks
from jaxchunk.bench.softmax_kernel import KERNEL_NAME
from jaxchunk.bench.softmax_workload import SoftmaxWorkload
from jaxchunk.errors import InputError

PAPER = {"m": 32768, "k": 2048, "n": 131072}
ON_CPU = ("pallas_interpret", "xla")


def exact_softmax(logits):
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def exact(a, b):
    a, b = (np.asarray(array, np.float64) for array in (a, b))
    return a.T @ exact_softmax(a @ b)


def rounded(a, b):
    """The same with logits and softmax rounded to the operands' dtype, as every implementation stores them."""
    logits = (np.asarray(a, np.float64) @ np.asarray(b, np.float64)).astype(a.dtype)
    return np.asarray(a, np.float64).T @ exact_softmax(logits).astype(a.dtype).astype(np.float64)


def error(value, expected):
    return np.linalg.norm(np.asarray(value, np.float64) - expected) / np.linalg.norm(expected)


def compiled(workload, num_chunks):
    operands = (
        jax.ShapeDtypeStruct(shape, workload.dtype) for shape in ((workload.m, workload.k), (workload.k, workload.n))
    )
    return jax.jit(workload.accumulate, static_argnums=2).lower(*operands, num_chunks).compile()


@pytest.mark.parametrize("num_chunks", [1, 4, 5, 23])
@pytest.mark.parametrize("softmax", ON_CPU)
def test_every_number_of_chunks_gives_the_same_accumulator(softmax, num_chunks):
    workload = SoftmaxWorkload(23, 16, 97, "float32", softmax)  # a prime number of rows: the last chunk is filled up
    a, b = workload.operands("random", logit_std=3.0)
    found = jax.jit(workload.accumulate, static_argnums=2)(a, b, num_chunks)
    assert found.shape == (16, 97) and found.dtype == jnp.float32
    assert error(found, exact(a, b)) < 1e-6
    assert error(workload.reference(a, b), exact(a, b)) < 1e-6


@pytest.mark.parametrize(
    ("softmax", "dtype"), [("pallas_interpret", "bfloat16"), ("xla", "bfloat16"), ("xla", "float16")]
)
def test_low_precision_is_no_worse_than_the_same_unchunked(softmax, dtype):
    workload = SoftmaxWorkload(64, 32, 300, dtype, softmax)
    a, b = workload.operands("random", logit_std=2.0)

    @jax.jit
    def unchunked(a, b):
        p = jax.nn.softmax(jnp.matmul(a, b), axis=1)
        return jnp.matmul(a.T, p, preferred_element_type=jnp.float32)

    found = jax.jit(workload.accumulate, static_argnums=2)(a, b, 4)
    assert 0 < error(found, exact(a, b)) <= 2 * error(unchunked(a, b), exact(a, b)) + 1e-6
    assert error(workload.reference(a, b), exact(a, b)) < 1e-6


def test_zero_operands_give_zeros():
    workload = SoftmaxWorkload(8, 4, 33, "float32", "xla")
    a, b = workload.operands("zero")
    assert a.shape == (8, 4) and b.shape == (4, 33)
    assert not a.any() and not b.any() and not workload.accumulate(a, b, 2).any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_random_operands_make_logits_of_the_standard_deviation_asked_for(dtype):
    workload = SoftmaxWorkload(512, 64, 700, dtype, "xla")
    a, b = workload.operands("random", 5, logit_std=4.0)
    assert a.shape == (512, 64) and b.shape == (64, 700) and a.dtype == b.dtype == dtype
    a64, b64 = (np.asarray(array, np.float64) for array in (a, b))
    assert a64.std() == pytest.approx(1.0, rel=0.02) and abs(a64.mean()) < 0.02
    assert (a64 @ b64).std() == pytest.approx(4.0, rel=0.05)
    again, other = (workload.operands("random", seed, logit_std=4.0)[0] for seed in (5, 6))
    assert (again == a).all() and (other != a).mean() > 0.9


def test_every_slab_of_random_operands_is_drawn_anew(monkeypatch):
    monkeypatch.setattr(softmax_workload, "_SLAB_ELEMENTS", 5 * 61)
    workload = SoftmaxWorkload(23, 61, 4, "float32", "xla")
    a, _ = workload.operands("random")
    assert np.unique(np.asarray(a)).size > 0.99 * a.size
    assert (np.asarray(a).std(axis=1) > 0.5).all()


def test_no_float32_copy_of_an_operand_is_made():
    shape = (2048, 16384)
    program = softmax_workload._normal.lower(jax.random.key(0), shape, 1.0, "bfloat16").compile()
    assert program.memory_analysis().temp_size_in_bytes < 0.9 * 4 * math.prod(shape)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda p: hasattr(p, "eqns") or hasattr(p, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("dtype", softmax_workload.DTYPES)
def test_the_precision_of_both_gemms(dtype):
    """What the compiler is asked for; a CPU would hide most departures from it."""
    workload = SoftmaxWorkload(64, 16, 97, dtype, "xla")
    operands = jax.ShapeDtypeStruct((64, 16), dtype), jax.ShapeDtypeStruct((16, 97), dtype)
    program = list(equations(jax.make_jaxpr(lambda a, b: workload.accumulate(a, b, 4))(*operands).jaxpr))
    logits, update = (e for e in program if e.primitive.name == "dot_general")
    assert logits.outvars[0].aval.shape == (16, 97) and logits.outvars[0].aval.dtype == dtype
    assert update.outvars[0].aval.shape == (16, 97) and update.outvars[0].aval.dtype == jnp.float32
    for gemm in (logits, update):
        assert {v.aval.dtype.name for v in gemm.invars} == {dtype}
        assert (gemm.params["precision"] is not None) == (dtype == "float32")
    (scan,) = (e for e in program if e.primitive.name == "scan")
    body = scan.params["jaxpr"].jaxpr
    (added,) = (e for e in body.eqns if update.outvars[0] in e.invars)
    assert added.primitive.name == "add" and list(body.outvars) == list(added.outvars)
    (carry,) = (v for v in added.invars if v in body.invars)
    assert sum(carry in e.invars for e in body.eqns) == 1  # or XLA:GPU could not accumulate inside the GEMM


@pytest.mark.parametrize("softmax", ON_CPU)
def test_the_compiled_program_has_the_chunks_asked_for(softmax):
    workload = SoftmaxWorkload(61, 16, 97, "float32", softmax)
    for num_chunks in (1, 2, 7):
        program = compiled(workload, num_chunks)
        assert surviving_chunks(program) == num_chunks
        assert softmax_survived(program)
    assert softmax_kernels(program) > {KERNEL_NAME}


@pytest.mark.parametrize(("dtype", "num_chunks"), [("bfloat16", 1), ("bfloat16", 4), ("float16", 4)])
def test_chunks_survive_in_low_precision(dtype, num_chunks):
    program = compiled(SoftmaxWorkload(64, 16, 97, dtype, "xla"), num_chunks)
    assert surviving_chunks(program) == num_chunks and softmax_survived(program)


class WithoutSoftmax(SoftmaxWorkload):
    def _softmax(self, logits):
        return logits


class WithUnusedSoftmax(SoftmaxWorkload):
    """The softmax is computed and returned, but the accumulator ignores it."""

    def accumulate(self, a, b, num_chunks):
        def step(acc, chunk):
            z = chunk @ b
            return acc + chunk.T @ z, jax.nn.softmax(z, axis=1)

        zeros = jnp.zeros(b.shape, jnp.float32)
        return jax.lax.scan(step, zeros, a.reshape(num_chunks, -1, self.k))


class WithSoftmaxOfOperands(SoftmaxWorkload):
    """Exponentials there are, and both GEMMs, but not of the logits."""

    def accumulate(self, a, b, num_chunks):
        return super().accumulate(jnp.exp(a), b, num_chunks) if num_chunks else None

    def _softmax(self, logits):
        return logits


class WithConstantSoftmax(SoftmaxWorkload):
    def _softmax(self, logits):
        return jnp.full_like(logits, 1 / self.n)


class WithoutChunks(SoftmaxWorkload):
    def accumulate(self, a, b, num_chunks):
        return super().accumulate(a, b, 1)


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("mutant", [WithoutSoftmax, WithUnusedSoftmax, WithSoftmaxOfOperands])
def test_a_result_that_ignores_the_softmax_is_found_out(mutant, num_chunks):
    program = compiled(mutant(64, 16, 97, "float32", "xla"), num_chunks)
    assert surviving_chunks(program) == num_chunks
    assert not softmax_survived(program)


@pytest.mark.parametrize("num_chunks", [1, 4])
def test_a_gemm_that_was_optimised_away_is_found_out(num_chunks):
    program = compiled(WithConstantSoftmax(64, 16, 97, "float32", "xla"), num_chunks)
    assert surviving_chunks(program) is None
    assert not softmax_survived(program)


def test_chunks_that_were_merged_are_found_out():
    program = compiled(WithoutChunks(64, 16, 97, "float32", "xla"), 4)
    assert surviving_chunks(program) == 1
    assert softmax_survived(program)


GPU_PROGRAM = r"""HloModule jit_accumulate, is_scheduled=true

%cut (p0: bf16[16,8,16], p1: s32[]) -> bf16[8,16] {
  %p0 = bf16[16,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %cut.1 = bf16[8,16]{1,0} dynamic-slice(%p0, %p1), dynamic_slice_sizes={1,8,16}
}

%body (carry: (s32[], f32[16,97], bf16[16,8,16], bf16[16,97])) -> (s32[], f32[16,97], bf16[16,8,16], bf16[16,97]) {
  %carry = (s32[], f32[16,97]{1,0}, bf16[16,8,16]{2,1,0}, /*index=3*/bf16[16,97]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carry), index=0
  %acc = f32[16,97]{1,0} get-tuple-element(%carry), index=1
  %chunks = bf16[16,8,16]{2,1,0} get-tuple-element(%carry), index=2
  %b = bf16[16,97]{1,0} get-tuple-element(%carry), index=3
  %slice_fusion = bf16[8,16]{1,0} fusion(%chunks, %i), kind=kLoop, calls=%cut
  %custom-call.1 = (bf16[8,97]{1,0}, s8[4194304]{0}) custom-call(%slice_fusion, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"beta":0}}
  %z = bf16[8,97]{1,0} get-tuple-element(%custom-call.1), index=0
  %p = bf16[8,97]{1,0} custom-call(%z), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{}: (0, {})}, metadata={op_name="jaxchunk_softmax_rows"}, backend_config={name = "jaxchunk_softmax_rows", ir = "ML\EFR(exp"}
  %custom-call.2 = (f32[16,97]{1,0}, s8[4194304]{0}) custom-call(%slice_fusion, %p, %acc), custom_call_target="__cublas$lt$matmul", output_to_operand_aliasing={{0}: (2, {})}, backend_config={"gemm_backend_config":{"beta":1}}
  %new = f32[16,97]{1,0} get-tuple-element(%custom-call.2), index=0
  ROOT %tuple = (s32[], f32[16,97]{1,0}, bf16[16,8,16]{2,1,0}, bf16[16,97]{1,0}) tuple(%i, %new, %chunks, %b)
}

%condition (c: (s32[], f32[16,97], bf16[16,8,16], bf16[16,97])) -> pred[] {
  %c = (s32[], f32[16,97]{1,0}, bf16[16,8,16]{2,1,0}, bf16[16,97]{1,0}) parameter(0)
  ROOT %go_on = pred[] constant(true)
}

ENTRY %main (a: bf16[128,16], b: bf16[16,97]) -> f32[16,97] {
  %a = bf16[128,16]{1,0} parameter(0)
  %b.1 = bf16[16,97]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %zeros = f32[16,97]{1,0} constant({...})
  %view = bf16[16,8,16]{2,1,0} bitcast(%a)
  %start = (s32[], f32[16,97]{1,0}, bf16[16,8,16]{2,1,0}, bf16[16,97]{1,0}) tuple(%zero, %zeros, %view, %b.1)
  %while = (s32[], f32[16,97]{1,0}, bf16[16,8,16]{2,1,0}, bf16[16,97]{1,0}) while(%start), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"16"}}
  ROOT %result = f32[16,97]{1,0} get-tuple-element(%while), index=1
}
"""  # noqa: E501


def program_of(text):
    return types.SimpleNamespace(as_text=lambda: text)


def test_a_gpu_program_is_read():
    assert surviving_chunks(program_of(GPU_PROGRAM)) == 16
    assert softmax_survived(program_of(GPU_PROGRAM))


@pytest.mark.parametrize(
    ("old", "new", "chunks", "survived"),
    [
        ('"known_trip_count":{"n":"16"}', "", None, True),
        ("custom-call(%slice_fusion, %p, %acc)", "custom-call(%slice_fusion, %z, %acc)", 16, False),
        ('"__gpu$xla.gpu.triton"', '"something_else"', 16, False),
        ("custom-call(%z)", "custom-call(%b)", 16, False),
        ("tuple(%i, %new, %chunks, %b)", "tuple(%i, %acc, %chunks, %b)", 16, False),
        ("index=1\n}\n", "index=3\n}\n", 16, False),
        (" custom-call(%slice_fusion, %b)", " fusion(%slice_fusion, %b), kind=kCustom", None, False),
        (GPU_PROGRAM, "", None, False),
    ],
)
def test_a_gpu_program_with_a_defect_is_found_out(old, new, chunks, survived):
    assert old in GPU_PROGRAM
    broken = program_of(GPU_PROGRAM.replace(old, new))
    assert (surviving_chunks(broken), softmax_survived(broken)) == (chunks, survived)


def test_temporary_memory_falls_with_chunks():
    workload = SoftmaxWorkload(1024, 16, 2048, "float32", "xla")
    temporaries = [compiled(workload, n).memory_analysis().temp_size_in_bytes for n in (1, 4, 16)]
    for before, after in itertools.pairwise(temporaries):
        assert after < 0.5 * before


@pytest.mark.parametrize("num_chunks", [1, 16])
@pytest.mark.parametrize(("dtype", "N"), [("bfloat16", 131072), ("float16", 1187), ("float32", 97), ("bfloat16", 1)])
@pytest.mark.parametrize("device_kind", ["NVIDIA H200", "NVIDIA GB10"])
def test_pallas_lowers_for_cuda_without_a_gpu(device_kind, dtype, N, num_chunks):
    workload = SoftmaxWorkload(4096, 64, N, dtype, "pallas")
    device = AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    operands = jax.ShapeDtypeStruct((4096, 64), dtype), jax.ShapeDtypeStruct((64, N), dtype)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        traced = jax.jit(workload.accumulate, static_argnums=2).trace(*operands, num_chunks)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.dot_general") == 2
    assert text.count("__gpu$xla.gpu.triton") == 1 and KERNEL_NAME in text
    assert "output_operand_alias" in text  # probabilities take the place of the logits
    assert text.count("stablehlo.while") == (num_chunks > 1)


def test_memory_at_the_papers_shape():
    workload = SoftmaxWorkload(**PAPER)
    assert (workload.dtype, workload.softmax) == ("bfloat16", "pallas")
    operands_and_accumulator = 2 * (32768 * 2048 + 2048 * 131072) + 4 * 2048 * 131072
    assert workload.memory_bytes(1) == operands_and_accumulator + 2 * 32768 * 131072
    assert workload.memory_bytes(16) == operands_and_accumulator + 2 * 2048 * (131072 + 2048)
    assert SoftmaxWorkload(**PAPER, softmax="xla").memory_bytes(16) - workload.memory_bytes(16) == 2 * 2048 * 131072
    assert SoftmaxWorkload(**PAPER, softmax="xla").memory_bytes(16) <= 3e9
    chunk_and_padded_copy = 2 * (2979 * (131072 + 2048) + 11 * 2979 * 2048)
    assert workload.memory_bytes(11) == operands_and_accumulator + chunk_and_padded_copy


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: SoftmaxWorkload(0, 1, 1), "m is 0; it must be at least 1"),
        (lambda: SoftmaxWorkload(1, -2, 1), "k is -2; it must be at least 1"),
        (lambda: SoftmaxWorkload(1, 1, 1, "int8"), "dtype is 'int8'; choose from bfloat16, float16, float32"),
        (
            lambda: SoftmaxWorkload(1, 1, 1, softmax="torch"),
            "softmax is 'torch'; choose from pallas, pallas_interpret, xla",
        ),
        (lambda: SoftmaxWorkload(1, 1, 1).operands("ones"), "inputs is 'ones'; choose from random, zero"),
        (
            lambda: SoftmaxWorkload(1, 1, 1).operands("random", logit_std=0.0),
            "logit_std is 0.0; it must be a finite number greater than 0",
        ),
        (lambda: SoftmaxWorkload(5, 1, 1).chunk_rows(0), "num_chunks is 0; for 5 rows it must be from 1 to 5"),
        (lambda: SoftmaxWorkload(5, 1, 1).memory_bytes(6), "num_chunks is 6; for 5 rows it must be from 1 to 5"),
        (
            lambda: SoftmaxWorkload(5, 1, 1).chunk_rows(4),
            "num_chunks is 4, which leaves some empty: 3 chunks of 2 rows hold all 5",
        ),
        (
            lambda: SoftmaxWorkload(4, 2, 3).accumulate(jnp.zeros((4, 3)), jnp.zeros((2, 3)), 1),
            "a is float32[4, 3]; it must be bfloat16[4, 2]",
        ),
        (
            lambda: SoftmaxWorkload(4, 2, 3, "float32").accumulate(jnp.zeros((4, 2)), jnp.zeros((3, 2)), 1),
            "b is float32[3, 2]; it must be float32[2, 3]",
        ),
    ],
)
def test_what_cannot_run_is_refused(attempt, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        attempt()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", softmax_workload.DTYPES)
@pytest.mark.parametrize("softmax", ["pallas", "xla"])
def test_on_a_gpu_the_accumulator_is_right(softmax, dtype):
    workload = SoftmaxWorkload(250, 128, 10007, dtype, softmax)
    a, b = workload.operands("random", logit_std=3.0)
    for num_chunks in (1, 4):
        found = jax.jit(workload.accumulate, static_argnums=2)(a, b, num_chunks)
        assert error(found, exact(a, b)) < 2 * error(rounded(a, b), exact(a, b)) + 1e-5


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("softmax", ["pallas", "xla"])
def test_on_a_gpu_chunks_survive_in_place(softmax):
    workload = SoftmaxWorkload(4096, 256, 32768, "bfloat16", softmax)
    for num_chunks in (1, 2, 16):
        program = compiled(workload, num_chunks)
        assert surviving_chunks(program) == num_chunks
        assert softmax_survived(program)
        needed = program.memory_analysis()
        total = needed.argument_size_in_bytes + needed.output_size_in_bytes + needed.temp_size_in_bytes
        assert total < workload.memory_bytes(num_chunks) + 64 * 2**20
        assert not re.findall(r"= f32\[256,32768\]\S* (?:copy|add|transpose)\(", program.as_text())
