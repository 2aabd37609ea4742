"""What holds for any operands: hypothesis draws them, in few shapes, so that few programs are compiled.

Most operands are quarters (whole numbers / 4): their logits are exact in float32 in whatever order they are summed, and
what should be equal is equal but for the exponentials.
"""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_head_oracle import ALL, ALL_BUT_FUSED_XLA, IGNORE, Problem

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import token_log_probs

T, D, V = 8, 4, 11
OPTIONS = ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"logit_softcap": 3.0, "logit_scale": 0.5})

some = settings(max_examples=25, deadline=None, derandomize=True, database=None)
implementations = pytest.mark.parametrize("implementation", ALL)
without_fused = pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)


def quarters(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int8, shape, elements=st.integers(-32, 32)).map(lambda a: a.astype(np.float32) / 4)


def floats(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(-100, 100, width=32, allow_subnormal=False))


def anything(*shape: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, shape, elements=st.floats(width=32, allow_subnormal=False))  # inf and NaN too


def labels_of(tokens: int, vocabulary: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.int32, tokens, elements=st.sampled_from([IGNORE, *range(vocabulary)]))


def problems(operands=quarters, tokens=T, vocabulary=V) -> st.SearchStrategy[Problem]:
    parts = operands(tokens, D), operands(vocabulary, D), labels_of(tokens, vocabulary)
    return st.builds(Problem, *parts)


@functools.cache
def compiled(implementation: str, gradients: bool = False, function=lm_head_loss, **options):
    """A jitted `function` of (problem, bias, token_weights), with the gradients of hidden, weight and bias if asked."""
    options = {"num_chunks": 3, "implementation": implementation} | options

    def loss(hidden, weight, bias, labels, **token_weights):
        return function(hidden, weight, labels, bias=bias, **token_weights, **options)

    value_and_grad = jax.value_and_grad(lambda *xs, **w: jnp.sum(loss(*xs, **w)), (0, 1, 2))
    program = jax.jit(value_and_grad if gradients else loss)

    def call(p: Problem, bias=None, **token_weights):
        bias = np.zeros(p.weight.shape[0], np.float32) if bias is None else bias
        return jax.tree.map(np.asarray, program(p.hidden, p.weight, bias, p.labels, **token_weights))

    return call


@implementations
@pytest.mark.parametrize("logit_softcap", [None, 30.0])
@pytest.mark.parametrize("operands", [floats, quarters])
def test_loss_is_never_negative_and_log_probabilities_never_positive(implementation, operands, logit_softcap):
    losses = compiled(implementation, reduction="none", logit_softcap=logit_softcap)
    log_probs = compiled(implementation, function=token_log_probs, logit_softcap=logit_softcap)

    @some
    @given(problems(operands))
    def holds(p):
        loss = losses(p)
        assert np.all(np.isfinite(loss)) and np.all(loss >= 0)
        assert np.all(log_probs(p) <= 0)
        assert np.all(loss[p.labels == IGNORE] == 0)

    holds()


@implementations
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_all_ignored_is_zero_with_zero_gradients(implementation, reduction):
    loss_and_gradients = compiled(implementation, gradients=True, reduction=reduction, z_loss=0.1, label_smoothing=0.1)

    @some
    @given(anything(T, D), quarters(V, D))
    def holds(hidden, weight):
        for leaf in jax.tree.leaves(loss_and_gradients(Problem(hidden, weight, np.full(T, IGNORE)))):
            np.testing.assert_array_equal(leaf, 0)

    holds()


@implementations
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_rows_may_hold_anything(implementation, reduction):
    loss_and_gradients = compiled(implementation, gradients=True, reduction=reduction, z_loss=0.1, label_smoothing=0.1)

    @some
    @given(problems(), anything(T, D))
    def holds(p, junk):
        ignored = (p.labels == IGNORE)[:, None]
        spoiled = loss_and_gradients(p._replace(hidden=np.where(ignored, junk, p.hidden)))
        jax.tree.map(np.testing.assert_array_equal, spoiled, loss_and_gradients(p))

    holds()


@without_fused
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_chunk_count_does_not_change_the_numbers(implementation, options):
    counts = [compiled(implementation, gradients=True, num_chunks=n, **options) for n in (1, 3, T)]

    @some
    @given(problems(), quarters(V))
    def holds(p, bias):
        one, *more = [count(p, bias) for count in counts]
        for many in more:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), many, one)

    holds()


@without_fused
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_in_another_order_have_the_same_losses(implementation, options):
    losses = compiled(implementation, reduction="none", **options)

    @some
    @given(problems(), st.permutations(range(T)))
    def holds(p, order):
        order = np.array(order)
        reordered = losses(Problem(p.hidden[order], p.weight, p.labels[order]))
        np.testing.assert_allclose(reordered, losses(p)[order], rtol=1e-6, atol=1e-30)

    holds()


@implementations
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_a_constant_added_to_all_logits_changes_nothing(implementation, label_smoothing):
    losses = compiled(implementation, reduction="none", label_smoothing=label_smoothing)

    @some
    @given(problems(), quarters(V), st.integers(-400, 400))
    def holds(p, bias, shift):
        # Smoothing subtracts the mean logit, which is rounded at the size of the logits: 1e-7 * 500.
        atol = 5e-5 if label_smoothing else 1e-30
        np.testing.assert_allclose(losses(p, bias + np.float32(shift)), losses(p, bias), rtol=2e-6, atol=atol)

    holds()


@without_fused
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sum_and_mean_are_those_of_the_token_losses(implementation, options):
    none, total, mean = (compiled(implementation, reduction=r, **options) for r in ("none", "sum", "mean"))

    @some
    @given(problems(), quarters(V))
    def holds(p, bias):
        losses, count = none(p, bias).astype(np.float64), np.sum(p.labels != IGNORE)
        np.testing.assert_allclose(total(p, bias), losses.sum(), rtol=1e-6, atol=1e-30)
        np.testing.assert_allclose(mean(p, bias), losses.sum() / max(count, 1), rtol=1e-6, atol=1e-30)

    holds()


@without_fused
def test_token_weights_that_are_equal_change_no_mean_and_ones_no_loss(implementation):
    mean, none = compiled(implementation), compiled(implementation, reduction="none")

    @some
    @given(problems(), st.sampled_from([0.001, 0.3, 7.0, 1000.0]))
    def holds(p, weight):
        for value in (1.0, weight):
            weights = np.full(T, value, np.float32)
            np.testing.assert_allclose(mean(p, token_weights=weights), mean(p), rtol=1e-6, atol=1e-30)
        np.testing.assert_array_equal(none(p, token_weights=np.ones(T, np.float32)), none(p))

    holds()


@without_fused
@pytest.mark.parametrize(("name", "largest"), [("z_loss", 2.0), ("label_smoothing", 0.5)])
def test_the_loss_is_linear_in_z_loss_and_label_smoothing(implementation, name, largest):
    zero, half, whole = (
        compiled(implementation, gradients=True, **{name: value}) for value in (0.0, largest / 2, largest)
    )

    @some
    @given(problems())
    def holds(p):
        ends = jax.tree.map(lambda a, b: (a + b) / 2, zero(p), whole(p))
        # A gradient sums terms of the size z_loss * lse * weight, of both signs: 2 * 250 * 8.
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-3), half(p)[1], ends[1])
        np.testing.assert_allclose(half(p)[0], ends[0], rtol=2e-6, atol=1e-4)

    holds()


@without_fused
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_gradient_of_the_bias_sums_to_zero_without_z_loss(implementation, label_smoothing):
    """No constant added to the logits matters, so that the gradient has no component along it."""
    loss_and_gradients = compiled(implementation, gradients=True, label_smoothing=label_smoothing)

    @some
    @given(problems(), quarters(V))
    def holds(p, bias):
        _, (_, _, d_bias) = loss_and_gradients(p, bias)
        assert abs(d_bias.astype(np.float64).sum()) <= 1e-6

    holds()


@implementations
def test_one_token(implementation):
    mean, total, none = (compiled(implementation, gradients=True, reduction=r) for r in ("mean", "sum", "none"))

    @some
    @given(problems(tokens=1), quarters(V))
    def holds(p, bias):
        results = [reduced(p, bias) for reduced in (mean, total, none)]
        for other in results[1:]:
            jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), other, results[0])

    holds()


@without_fused  # which has 16 columns or more
def test_a_vocabulary_of_one_is_certain(implementation):
    loss_and_gradients = compiled(implementation, gradients=True, label_smoothing=0.1)
    z_loss = compiled(implementation, reduction="none", z_loss=0.5)

    @some
    @given(problems(vocabulary=1), quarters(1))
    def holds(p, bias):
        for leaf in jax.tree.leaves(loss_and_gradients(p, bias)):
            np.testing.assert_array_equal(leaf, 0)
        lse = (p.hidden @ p.weight.T)[:, 0] + bias[0]
        np.testing.assert_allclose(z_loss(p, bias), np.where(p.labels == IGNORE, 0, 0.5 * lse**2), rtol=1e-6)

    holds()
