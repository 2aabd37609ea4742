"""What the compiler makes of the loss: GEMM count, the loop, memory, and lowering for a GPU that is not here."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxchunk import lm_head_loss

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


@pytest.mark.parametrize("num_chunks", [1, 4])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("device_kind", ["NVIDIA H200", "NVIDIA GB10", "NVIDIA GeForce RTX 4090"])
def test_pallas_lowers_for_cuda_without_a_gpu(device_kind, dtype, num_chunks):
    device = AbstractDevice(device_kind=device_kind, num_cores=132, platform="gpu")
    operands = tuple(
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((16384, 896), dtype), ((151936, 896), jnp.float32), ((16384,), jnp.int32))
    )
    gradients = jax.value_and_grad(lambda *xs: lm_head_loss(*xs, num_chunks=num_chunks), (0, 1))
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        text = jax.jit(gradients).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("stablehlo.dot_general") == 3
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert "output_operand_alias" in text  # dlogits take the place of the logits


@pytest.mark.gpu
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
