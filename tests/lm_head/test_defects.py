"""One test for each defect that a peer of this loss has or had (PEERS.md of the project), named after it."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_head_oracle import (
    ALL,
    CHUNKED,
    DTYPES,
    IGNORE,
    Problem,
    Result,
    assert_as_exact,
    assert_close,
    oracle,
    problem,
    relative_error,
    same_dtype_baseline,
    value_and_grads,
)

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import choose_implementation, token_log_probs
from jaxchunk.lm_head.dispatch import FUSED


@pytest.mark.parametrize("through", ["weight", "bias"])
@pytest.mark.parametrize("implementation", ALL)
def test_zero_padded_vocabulary_columns_do_not_enter_the_log_sum_exp(implementation, through):
    """A padded column entering the sum with a logit of 0 would drown a row whose logits are near -30."""
    p, options, dtype = problem(V=1187), {}, jnp.float32
    if through == "weight":
        hidden = jnp.concatenate([p.hidden, jnp.ones((33, 1))], axis=1)
        weight = jnp.concatenate([p.weight, jnp.full((1187, 1), -30.0)], axis=1)
        # What all rows of W have in common cancels between dX's GEMM and its label row, in the digits of float32, where
        # the label-offset algorithm errs 2.4 times as much as one GEMM: it is judged in those that it is made for.
        dtype = jnp.bfloat16 if implementation in FUSED else dtype
        p = Problem(hidden.astype(dtype), weight.astype(dtype), p.labels)
    else:  # padding of hidden and weight alone would give a logit of 0 here too, and -30 only if the bias were padded
        options = {"bias": jnp.full(1187, -30.0), "label_smoothing": 0.1, "z_loss": 0.1}
    result = value_and_grads(p, num_chunks=4, implementation=implementation, **options)
    assert_as_exact(result, oracle(p, **options), same_dtype_baseline(p, **options), dtype)


@pytest.mark.parametrize("implementation", ALL)
def test_log_sum_exp_and_loss_are_not_kept_in_bfloat16(implementation):
    """Operands are small whole numbers, so that bfloat16 holds the logits exactly and nothing excuses an error."""
    p, options = whole_number_problem(), {"z_loss": 0.1, "label_smoothing": 0.1, "with_metrics": True}
    for reduction in ("mean", "none"):
        result = value_and_grads(p, reduction=reduction, num_chunks=4, implementation=implementation, **options)
        exact = oracle(p, reduction=reduction, **options)
        assert_close((result.loss, result.metrics), (exact.loss, exact.metrics), 1e-6)


def whole_number_problem() -> Problem:
    p = problem(D=8)
    return Problem(*(jnp.round(2 * a / jnp.std(a)).astype(jnp.bfloat16) for a in (p.hidden, p.weight)), p.labels)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("margin", [10.0, 20.0, 30.0])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_softmax_is_not_rounded_before_the_label_is_subtracted(implementation, margin, dtype):
    """Where softmax_y - 1 would be 0 or noise, the gradient of a confident label keeps its digits."""
    T, V, D = 16, 97, 128
    labels = jnp.arange(T) * 5
    weight = jnp.eye(V, D, dtype=dtype)
    p = Problem(margin * weight[labels], weight, labels)
    result, exact = value_and_grads(p, num_chunks=4, implementation=implementation), oracle_of_margins(p, margin)
    assert result.loss >= 0
    assert relative_error(result.loss, exact.loss) < 1e-5
    tolerance = max(1e-5, float(jnp.finfo(dtype).eps))
    assert relative_error(result.d_hidden, exact.d_hidden) < tolerance
    assert relative_error(result.d_weight, exact.d_weight) < tolerance


def oracle_of_margins(p: Problem, margin: float) -> Result:
    """In closed form (float64's own softmax_y - 1 cancels too): every row has one logit of `margin`, the rest are 0."""
    T, V = p.labels.size, p.weight.shape[0]
    rest = (V - 1) * np.exp(-margin)
    dz = np.full((T, V), np.exp(-margin) / (1 + rest) / T)
    dz[np.arange(T), np.asarray(p.labels)] = -rest / (1 + rest) / T
    x, W = (np.asarray(a, np.float64) for a in (p.hidden, p.weight))
    return Result(np.log1p(rest), dz @ W, dz.T @ x)


@pytest.mark.parametrize("scale", [3.0, 30.0])
@pytest.mark.parametrize("implementation", ALL)
def test_softcap_gradient_has_the_derivative_of_tanh(implementation, scale):
    """At a scale of 30 most logits are far above the cap of 2, where the derivative is next to nothing."""
    p = problem(scale=scale)
    result = value_and_grads(p, logit_softcap=2.0, num_chunks=4, implementation=implementation)
    assert_close(result, oracle(p, logit_softcap=2.0))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ALL)
def test_ignored_rows_do_not_count_in_the_mean(implementation, reduction):
    p = problem(T=32)
    labels = p.labels.at[8:16].set(IGNORE)  # with 4 chunks, the whole second chunk
    kept = labels != IGNORE
    options = {"reduction": reduction, "num_chunks": 4, "implementation": implementation}
    result = value_and_grads(p._replace(labels=labels), **options)
    alone = oracle(Problem(p.hidden[kept], p.weight, labels[kept]), reduction=reduction)
    loss = result.loss[kept] if reduction == "none" else result.loss
    assert_close((loss, result.d_hidden[kept], result.d_weight), alone[:3])
    assert np.all(result.d_hidden[~kept] == 0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ALL)
def test_z_loss_is_in_the_loss_and_its_gradient_has_the_right_factor(implementation, reduction):
    """Judged alone: what a z-loss of 1 adds to the loss and to the gradients."""
    p = problem()
    options = {"reduction": reduction, "num_chunks": 4, "implementation": implementation}
    without, with_z = (value_and_grads(p, z_loss=z, **options) for z in (0.0, 1.0))
    exact = [oracle(p, z_loss=z, reduction=reduction) for z in (0.0, 1.0)]
    added, due = (jax.tree.map(np.subtract, *pair) for pair in ((with_z, without), (exact[1], exact[0])))
    assert relative_error(exact[1].loss, exact[0].loss) > 1
    assert_close(added, due)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ALL)
def test_per_token_cotangents_are_applied_before_the_token_sum(implementation, dtype):
    p = problem(dtype=dtype)
    cotangent = np.asarray(jax.random.normal(jax.random.key(1), (33,)))  # of both signs: the sum is another thing
    result = value_and_grads(p, cotangent, reduction="none", num_chunks=4, implementation=implementation)
    exact, baseline = (f(p, cotangent, reduction="none") for f in (oracle, same_dtype_baseline))
    assert_as_exact(result, exact, baseline, dtype)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", CHUNKED)
def test_d_weight_is_not_accumulated_in_bfloat16_across_chunks(implementation, reduction):
    """A bf16 carry would lose a bit with every chunk; the fp32 one must not. Nor may that of the bias."""
    p = problem(T=256, V=97, dtype=jnp.bfloat16, ignored=0.0)
    options = {"bias": jnp.zeros(97, jnp.bfloat16), "reduction": reduction}
    exact = oracle(p, **options)
    one, many = (value_and_grads(p, num_chunks=n, implementation=implementation, **options) for n in (1, 256))
    for name in ("d_weight", "d_bias"):
        errors = [relative_error(getattr(result, name), getattr(exact, name)) for result in (one, many)]
        assert errors[1] <= 1.1 * errors[0], name


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_float32_operands_do_not_run_as_tf32(implementation, reduction):
    p = problem(T=256, D=512, V=4097)
    result = value_and_grads(p, reduction=reduction, num_chunks=2, implementation=implementation)
    exact = oracle(p, reduction=reduction)
    assert relative_error(result.d_hidden, exact.d_hidden) < 5e-6  # TF32 is at 3e-4
    assert relative_error(result.d_weight, exact.d_weight) < 5e-6


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_no_int32_overflow_above_two_to_the_31_logits(reduction):
    T, D, V = 16385, 64, 151936
    p = problem(T=T, D=D, V=V, dtype=jnp.bfloat16, ignored=0.0)
    loss = functools.partial(lm_head_loss, num_chunks=1, implementation="pallas", reduction=reduction)
    dx = jax.jit(jax.grad(lambda *xs: jnp.sum(loss(*xs))))(*p)
    rows = np.array([0, 1, T // 2, 14133, 14134, 14135, T - 2, T - 1])  # 2^31 logits end in row 14134
    sample = Problem(p.hidden[rows], p.weight, p.labels[rows])
    exact = oracle(sample, reduction="sum").d_hidden
    assert relative_error(dx[rows], exact) < 5e-3


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="tests a machine without a GPU")
def test_a_kernel_that_cannot_run_does_not_fall_back_quietly():
    p = problem(T=12, D=8)
    words = "implementation='pallas' cannot run: it needs an NVIDIA GPU and JAX runs on cpu"
    with pytest.raises(ValueError, match=words):
        lm_head_loss(*p, implementation="pallas")
    with pytest.raises(ValueError, match=words):
        token_log_probs(*p, implementation="pallas")
    assert "JAX runs on cpu" in choose_implementation().reason  # and where nobody named one, it says why


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_kernel_does_not_fall_back_quietly_for_an_option(softcap, reduction):
    p = problem(T=26, D=8)
    options = {"bias": jnp.ones(97), "token_weights": jnp.ones(26), "label_smoothing": 0.1, "z_loss": 0.1}
    options |= {"logit_softcap": softcap, "logit_scale": 0.5, "reduction": reduction}

    def program(implementation):
        loss = lambda *xs: jnp.sum(lm_head_loss(*xs, p.labels, implementation=implementation, num_chunks=2, **options))  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(p.hidden, p.weight))

    assert "pallas_call" in program("pallas_interpret")
    assert "pallas_call" not in program("xla")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("implementation", ALL)
def test_loss_is_not_below_zero_and_log_probabilities_not_above(implementation, dtype):
    """Labels from certain to hopeless, other logits near -50: z_y - lse of a certain one rounds to either side of 0."""
    p = problem(T=201, D=97, V=97, ignored=0.0)
    weight, margins = jnp.eye(97, dtype=dtype), jnp.linspace(-100.0, 100.0, 201)
    hidden = (p.hidden + margins[:, None] * weight[p.labels].astype(jnp.float32)).astype(dtype)
    options = {"bias": jnp.full(97, -50.3), "num_chunks": 4, "implementation": implementation}
    losses = lm_head_loss(hidden, weight, p.labels, reduction="none", **options)
    log_probs = token_log_probs(hidden, weight, p.labels, **options)
    assert jnp.all(losses >= 0)
    assert jnp.all(log_probs <= 0)
    assert_close(log_probs, -losses)
    assert jnp.min(losses) < 1e-30 < 50 < jnp.max(losses)


def scaled(result: Result, factor: float) -> Result:
    return jax.tree.map(lambda a: a * factor, result)


def without_softcap_derivative(p: Problem) -> Result:
    """The capped logits taken for operands: their gradients are handed on as they are."""
    x, W = (np.asarray(a, np.float64) for a in (p.hidden, p.weight))
    loss, dz, _, *_ = oracle(Problem(5.0 * np.tanh(x @ W.T / 5.0), np.eye(len(W)), p.labels))
    return Result(loss, dz @ W, dz.T @ x)


DEFECTS = {
    "one percent too much": lambda p: scaled(oracle(p), 1.01),
    "mean over all rows": lambda p: scaled(oracle(p), np.mean(np.asarray(p.labels) != IGNORE)),
    "z-loss left out of the gradient": lambda p: oracle(p)._replace(loss=oracle(p, z_loss=1e-2).loss),
    "z-loss gradient of half the size": lambda p: oracle(p, z_loss=5e-3)._replace(loss=oracle(p, z_loss=1e-2).loss),
    "z-loss left out of the loss": lambda p: oracle(p, z_loss=1e-2)._replace(loss=oracle(p).loss),
    "smoothing left out of the gradient": lambda p: oracle(p)._replace(loss=oracle(p, label_smoothing=0.1).loss),
    "softcap left out": lambda p: oracle(p),
    "softcap without its derivative": without_softcap_derivative,
}
DUE = {"z-loss": {"z_loss": 1e-2}, "smoothing": {"label_smoothing": 0.1}, "softcap": {"logit_softcap": 5.0}}


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_tolerances_can_fail(defect, dtype):
    """The rule that judges every implementation refuses the results of these defects, in bfloat16 too."""
    options = next((due for name, due in DUE.items() if name in defect), {})
    p = problem(dtype=dtype)
    exact, baseline = oracle(p, **options), same_dtype_baseline(p, **options)
    assert_as_exact(baseline, exact, baseline, dtype)
    with pytest.raises(AssertionError, match="relative error"):
        assert_as_exact(DEFECTS[defect](p), exact, baseline, dtype)


@pytest.mark.parametrize("implementation", ALL)
def test_chunk_counts_need_not_divide_the_batch(implementation):
    p = problem(T=33, V=1187)
    one = value_and_grads(p, num_chunks=1, implementation=implementation)
    for num_chunks in (2, 4, 7, 16, 33):
        many = value_and_grads(p, num_chunks=num_chunks, implementation=implementation)
        chex.assert_trees_all_close(many, one, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("num_chunks", [1, 4, None])
def test_no_heuristic_cuts_the_batch_into_tiny_chunks(num_chunks):
    """At the shape where Liger's rule (by D and V, without a look at the GPU) gives 128 chunks of 128 tokens."""
    T, D, V = 16384, 896, 151936
    operands = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (((T, D), jnp.bfloat16), ((V, D), jnp.float32), ((T,), jnp.int32))
    ]
    options = {} if num_chunks is None else {"num_chunks": num_chunks}
    gradients = jax.grad(lambda *xs: lm_head_loss(*xs, **options), (0, 1))
    program = str(jax.make_jaxpr(gradients)(*operands))
    assert f"[{T // (num_chunks or 1)},{V}]" in program  # the logits of one chunk, and of no smaller one
    assert program.count(" scan[") == (num_chunks == 4)
