"""A chunk's attention in two parts: the merge, what cuDNN is given, and, on a GPU, what it gives."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from jaxchunk.inference.attention import attend_causally, merge


def operands(B, T, P, N, K, H, dtype, scale=1.0):
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, P, K, H), (B, P, K, H))
    return [(scale * jax.random.normal(key, shape)).astype(dtype) for key, shape in zip(keys, shapes, strict=True)]


def reference(q, k, v, before_k, before_v):
    """Queries from P on of the whole sequence."""
    P = before_k.shape[1]
    keys, values = (jnp.concatenate(pair, axis=1) for pair in ((before_k, k), (before_v, v)))
    queries = jnp.pad(q, ((0, 0), (P, 0), (0, 0), (0, 0)))
    with jax.default_matmul_precision("highest"):
        return jax.nn.dot_product_attention(queries, keys, values, is_causal=True, implementation="xla")[:, P:]


@pytest.mark.parametrize("P", [0, 7])
def test_a_chunk_sees_what_was_before_it(P):
    given = operands(2, 5, P, 4, 2, 8, jnp.float32)
    np.testing.assert_allclose(attend_causally(*given, "xla"), reference(*given), rtol=1e-5, atol=1e-6)


def test_two_parts_merge_to_the_whole():
    q, k, v, before_k, before_v = operands(2, 5, 7, 4, 2, 8, jnp.float32, scale=3.0)
    parts = []
    for keys, values, is_causal in ((before_k, before_v, False), (k, v, True)):
        out, lse = jax.nn.dot_product_attention(
            q, keys, values, is_causal=is_causal, return_residual=True, implementation="xla"
        )
        parts.append((out, lse[..., None]))
    np.testing.assert_allclose(merge(*parts), reference(q, k, v, before_k, before_v), rtol=1e-5, atol=1e-5)


def test_cudnn_is_given_no_mask_and_no_future_keys(monkeypatch):
    """Lowered for a GPU that is not there."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(1, 64, 192, 4, 2, 64, jnp.bfloat16)]
    traced = jax.jit(lambda *given: attend_causally(*given, "cudnn")).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    masks = [re.search(r"mask_type[^A-Z]*([A-Z_]+)", line)[1] for line in calls]
    assert sorted(masks) == ["CAUSAL", "NO_MASK"]
    for line, mask in zip(calls, masks, strict=True):
        num_keys = 64 if mask == "CAUSAL" else 192
        taken, given = line.rsplit(" : ", 1)[1].split(" -> ")
        assert re.findall(r"tensor<([\dx]+)x[a-z]+\d+>", taken) == ["1x64x4x64", *[f"1x{num_keys}x2x64"] * 2]
        assert "tensor<1x4x64xf32>" in given  # the denominators, which go into the merge unrounded
    assert text.count("dot_general") == 0 and "tensor<1x4x64xbf16>" not in text


@pytest.mark.parametrize(("T", "P"), [(33, 64), (32, 65), (33, 65)])
def test_cudnn_gets_odd_lengths_as_even_ones(monkeypatch, T, P):
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in operands(1, T, P, 4, 2, 64, jnp.bfloat16)]
    lowered = jax.jit(lambda *given: attend_causally(*given, "cudnn")).trace(*given).lower(lowering_platforms=("cuda",))
    calls = [line for line in lowered.as_text().splitlines() if "__cudnn$fmha" in line]
    masks = sorted(re.search(r"mask_type[^A-Z]*([A-Z_]+)", line)[1] for line in calls)
    assert masks == ["CAUSAL", "PADDING" if P % 2 else "NO_MASK"]  # a key that is none must not be seen
    assert lowered.out_info.shape == (1, T, 4, 64)


@pytest.mark.gpu
@pytest.mark.parametrize(("T", "P"), [(256, 768), (100, 333), (101, 334)])
def test_cudnn_in_two_parts_is_as_exact_as_in_one(T, P):
    given = operands(2, T, P, 14, 2, 64, jnp.bfloat16)
    exact = reference(*(a.astype(jnp.float32) for a in given))
    whole = [jnp.concatenate(pair, axis=1) for pair in ((given[3], given[1]), (given[4], given[2]))]
    queries = jnp.pad(given[0], ((0, 0), (P, 0), (0, 0), (0, 0)))
    one = jax.nn.dot_product_attention(queries, *whole, is_causal=True, implementation="cudnn")[:, P:]
    two = jax.jit(lambda *given: attend_causally(*given, "cudnn"))(*given)
    errors = [float(jnp.linalg.norm(out.astype(jnp.float32) - exact)) for out in (one, two)]
    assert 0 < errors[1] < 2 * errors[0]
