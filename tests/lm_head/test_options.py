"""Every option of the loss, alone and with others, in every implementation, against float64."""

import functools
import inspect
import sys
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lm_head_oracle import (
    ALL,
    ALL_BUT_FUSED_XLA,
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
    sizes,
    value_and_grads,
)

from jaxchunk import lm_head_loss
from jaxchunk.lm_head import token_log_probs

# One entry an option; what is None here is an array and is drawn with the problem.
OPTIONS = {
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "normalizer": {"normalizer": 50.0},
    "token_weights": {"token_weights": None},
    "bias": {"bias": None},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 0.01},
    "logit_softcap": {"logit_softcap": 5.0},
    "logit_scale": {"logit_scale": 0.7},
    "dv": {"weight_layout": "dv"},
    "ignore_index": {"ignore_index": 7},
    "with_metrics": {"with_metrics": True},
}
EVERYTHING = "token_weights+bias+label_smoothing+z_loss+logit_softcap+logit_scale+dv+with_metrics"
MATRIX = [
    *OPTIONS,
    "sum+token_weights",
    "none+token_weights",
    "normalizer+token_weights",
    "bias+logit_softcap",
    "bias+logit_scale",
    "logit_softcap+label_smoothing",
    "logit_softcap+z_loss",
    "label_smoothing+z_loss",
    "none+z_loss",
    "none+bias+logit_softcap",
    "with_metrics+none",
    "with_metrics+token_weights+z_loss",
    EVERYTHING,
    f"sum+{EVERYTHING}",
    f"none+{EVERYTHING}",
    f"normalizer+ignore_index+{EVERYTHING}",
]
NOT_IN_THE_MATRIX = {"num_chunks", "implementation", "compute_dtype", "accum_dtype", "token_axis", "vocab_axis"}


class Case(NamedTuple):
    problem: Problem
    cotangent: np.ndarray
    options: dict


def make_case(names: str, T=33, D=24, V=97, dtype=jnp.float32) -> Case:
    """Logits that spread enough for a softcap to bend them; every other label is the largest logit's."""
    p = problem(T, D, V, dtype, scale=3.0)
    largest = jnp.argmax(p.hidden @ p.weight.T, axis=1)
    p = p._replace(labels=jnp.where((p.labels != IGNORE) & (jnp.arange(T) % 2 == 0), largest, p.labels))
    keys = jax.random.split(jax.random.key(1), 4)
    weights = jax.random.uniform(keys[0], (T,), minval=0.2, maxval=2.0) * (jax.random.uniform(keys[1], (T,)) > 0.2)
    arrays = {"token_weights": weights, "bias": jax.random.normal(keys[2], (V,)).astype(dtype)}
    options: dict = {}
    for name in names.split("+"):
        options |= {key: arrays[key] if value is None else value for key, value in OPTIONS[name].items()}
    if "weight_layout" in options:
        p = p._replace(weight=p.weight.T)
    if "ignore_index" in options:
        p = p._replace(labels=jnp.where(p.labels == IGNORE, options["ignore_index"], p.labels))
    shape = (T,) if options.get("reduction") == "none" else ()
    return Case(p, np.asarray(jax.random.normal(keys[3], shape)), options)


@functools.cache
def judged_case(names: str, T: int, D: int, V: int, dtype) -> tuple[Case, Result, Result]:
    case = make_case(names, T, D, V, dtype)
    args = case.problem, case.cotangent
    return case, oracle(*args, **case.options), same_dtype_baseline(*args, **case.options)


@pytest.mark.parametrize("implementation", ALL)  # on top, so that those of one case run one after the other (its cache)
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("names", MATRIX, ids=lambda names: names.replace(EVERYTHING, "everything"))
def test_options_are_as_exact_as_unchunked(implementation, names, dtype):
    num_chunks = 7 if implementation in ("pallas", "fused") else 4
    case, exact, baseline = judged_case(names, *sizes(implementation), dtype)
    result = value_and_grads(
        case.problem, case.cotangent, num_chunks=num_chunks, implementation=implementation, **case.options
    )
    assert_as_exact(result, exact, baseline, dtype)


def test_the_matrix_has_every_option_alone(capsys):
    """A new option of the signature belongs in the matrix; says how many cases it has."""
    parameters = inspect.signature(lm_head_loss).parameters.values()
    keywords = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert {key for options in OPTIONS.values() for key in options} == keywords - NOT_IN_THE_MATRIX
    assert len(set(MATRIX)) == len(MATRIX)
    implementations, sets, dtypes = len(ALL), len(MATRIX), len(DTYPES)
    with capsys.disabled():  # on stderr, which pytest-xdist's workers share with the terminal
        print(
            f"\noption matrix: {implementations * sets * dtypes} cases, {implementations} implementations (2 on a GPU) "
            f"x {sets} sets of options ({len(OPTIONS)} of one) x {dtypes} dtypes",
            file=sys.stderr,
        )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_metrics_are_exact_in_every_reduction(implementation, reduction):
    """Logits are whole numbers, exact in bfloat16 too, and have ties, which count as correct."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weight = (
        jax.random.randint(k, s, -2, 3).astype(jnp.bfloat16) for k, s in zip(keys[:2], [(33, 6), (97, 6)], strict=True)
    )
    logits = hidden.astype(jnp.float32) @ weight.astype(jnp.float32).T
    assert jnp.sum(logits == jnp.max(logits, axis=1, keepdims=True)) > 33
    labels = jnp.where(jnp.arange(33) % 3 == 0, 96 - jnp.argmax(logits[:, ::-1], axis=1), jnp.arange(33))
    p = Problem(hidden, weight, labels.at[5:9].set(IGNORE))
    options = {"token_weights": jnp.ones(33).at[9:12].set(0.0), "z_loss": 0.1, "logit_scale": 0.5}
    loss = functools.partial(lm_head_loss, reduction=reduction, num_chunks=4, implementation=implementation, **options)

    @jax.jit
    def with_and_without(labels):
        return loss(hidden, weight, labels, with_metrics=True), loss(hidden, weight, labels)

    (value, metrics), value_alone = with_and_without(p.labels)
    np.testing.assert_allclose(value, value_alone, rtol=1e-6)
    exact = oracle(p, with_metrics=True, **options).metrics
    assert metrics._fields == (*exact._fields, "num_taken_twice")
    assert [m.dtype for m in metrics] == [jnp.int32, *[jnp.float32] * 4, jnp.int32]
    assert metrics.num_valid_tokens == exact.num_valid_tokens and metrics.num_taken_twice == 0
    assert_close(tuple(metrics[:-1]), tuple(exact), 1e-6)
    ignored = with_and_without(jnp.full(33, IGNORE))
    chex.assert_trees_all_equal(ignored, jax.tree.map(jnp.zeros_like, ignored))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_a_gradient_through_a_metric_raises(implementation, reduction):
    case = make_case("with_metrics+bias+token_weights+z_loss")
    p, options = case.problem, case.options | {"reduction": reduction}

    def sums(hidden, weight):
        output = lm_head_loss(hidden, weight, p.labels, num_chunks=4, implementation=implementation, **options)
        return jax.tree.map(jnp.sum, output)

    through = [lambda *xs, name=name: getattr(sums(*xs)[1], name) for name in ("accuracy", "mean_lse", "mean_entropy")]
    through.append(lambda *xs: sums(*xs)[0] + sums(*xs)[1].z_loss)
    for objective in through:
        for gradient in (jax.jit(jax.grad(objective, (0, 1))), jax.grad(objective)):
            with pytest.raises(TypeError, match=r"metrics .*are not differentiable"):
                gradient(p.hidden, p.weight)
    gradients, metrics = jax.jit(jax.grad(sums, (0, 1), has_aux=True))(p.hidden, p.weight)
    exact = oracle(p, **options)
    assert_close((*gradients, *metrics[:-1]), (exact.d_hidden, exact.d_weight, *exact.metrics))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("names", ["none", "none+bias+logit_softcap+logit_scale+dv"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_token_log_probs(implementation, names, dtype):
    case, exact, baseline = judged_case(names, 33, 24, 97, dtype)
    p, options = case.problem, {k: v for k, v in case.options.items() if k != "reduction"}
    bias = options.pop("bias", None)

    def losses(hidden, weight, bias):
        log_probs = token_log_probs(
            hidden, weight, p.labels, bias=bias, num_chunks=4, implementation=implementation, **options
        )
        return jnp.sum(-case.cotangent * log_probs), -log_probs

    gradients = jax.jit(jax.grad(losses, (0, 1, 2), has_aux=True))
    gradients, loss = gradients(p.hidden, p.weight, bias)
    assert (loss.dtype, loss.shape) == (jnp.float32, (33,))
    assert jnp.all(loss >= 0)
    assert jnp.all(loss[p.labels == IGNORE] == 0)
    assert_as_exact(Result(np.asarray(loss), *gradients), exact, baseline, dtype)


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_a_traced_logit_scale_is_differentiable(implementation):
    """As a learnt temperature is: d loss / d scale = <hidden, d_hidden> / scale."""
    case = make_case(EVERYTHING)
    p, options = case.problem, case.options
    fixed = {key: value for key, value in options.items() if key not in ("logit_scale", "with_metrics")}
    loss = functools.partial(lm_head_loss, *p, num_chunks=4, implementation=implementation, **fixed)
    value_and_grad = jax.jit(jax.value_and_grad(lambda scale: loss(logit_scale=scale)))
    for scale in (0.7, 1.3):
        exact = oracle(p, **fixed, logit_scale=scale)
        value, gradient = value_and_grad(scale)
        assert_close((value, gradient), (exact.loss, np.sum(exact.d_hidden * np.asarray(p.hidden)) / scale), 1e-5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ALL)
def test_nan_of_a_token_that_does_not_count_is_not_in_the_gradient_of_the_scale(implementation, reduction):
    """It is a sum over all tokens of products with their hidden states, and 0 * NaN is NaN."""
    p = problem(ignored=0.0)
    labels, token_weights = p.labels.at[3].set(IGNORE), jnp.ones(33).at[6].set(0.0)

    def gradient(hidden: jax.Array) -> jax.Array:
        options = {"token_weights": token_weights, "reduction": reduction, "implementation": implementation}
        total = lambda scale: jnp.sum(lm_head_loss(hidden, p.weight, labels, logit_scale=scale, **options))  # noqa: E731
        return jax.jit(jax.grad(total))(0.7)

    assert_close(gradient(p.hidden.at[jnp.array([3, 6])].set(jnp.nan)), gradient(p.hidden), 1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_frozen_operands_do_not_change_the_other_gradients(implementation, reduction):
    case = make_case("none+" + EVERYTHING if reduction == "none" else EVERYTHING)
    p, options = case.problem, case.options | {"reduction": reduction, "with_metrics": False}
    exact = oracle(p, case.cotangent, **options)
    operands = p._asdict() | {name: options.pop(name) for name in ("bias", "token_weights")}

    def objective(trained):
        loss = lm_head_loss(**operands | trained, num_chunks=4, implementation=implementation, **options)
        return jnp.sum(case.cotangent * loss)

    for names in (("hidden",), ("weight",), ("bias",), ("token_weights",), ("hidden", "bias")):
        for name, gradient in jax.jit(jax.grad(objective))({name: operands[name] for name in names}).items():
            assert_close(gradient, getattr(exact, f"d_{name}"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_losses_of_one_shape_with_different_frozen_operands_add_up(implementation, reduction):
    """JAX runs all their forward passes before the first backward one, and may hold them for the same function."""
    p = problem()
    loss = jax.jit(functools.partial(lm_head_loss, reduction=reduction, num_chunks=4, implementation=implementation))

    def total(x, W):
        frozen_x, frozen_W = jax.lax.stop_gradient((x, W))
        calls = ((x, W), (x, frozen_W), (frozen_x, W), (frozen_x, frozen_W))
        return sum(jnp.sum(loss(x, W, p.labels)) for x, W in calls)

    one = oracle(p, reduction=reduction)
    gradients = jax.grad(total, (0, 1))(p.hidden, p.weight)
    assert_close(gradients, (2 * one.d_hidden, 2 * one.d_weight))


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_per_token_losses_with_everything_under_vmap_and_scan_and_remat_and_jit(implementation):
    """Two batches of 12 tokens: values, and gradients for a random cotangent of each token."""
    case = make_case(f"none+{EVERYTHING}", T=24)
    p, options = case.problem, case.options | {"with_metrics": False}
    exact, weight_and_bias = oracle(p, case.cotangent, **options), (p.weight, options.pop("bias"))
    batches = jax.tree.map(
        lambda a: a.reshape(2, 12, *a.shape[1:]), (p.hidden, p.labels, options.pop("token_weights"), case.cotangent)
    )

    def losses(hidden, weight_and_bias, labels, token_weights):
        weight, bias = weight_and_bias
        return lm_head_loss(
            hidden, weight, labels, bias=bias, token_weights=token_weights, num_chunks=5,
            implementation=implementation, **options,
        )  # fmt: skip

    def value_and_grads_of(losses):
        def both(hidden, weight_and_bias, labels, token_weights, cotangent):
            value, vjp = jax.vjp(lambda x, W: losses(x, W, labels, token_weights), hidden, weight_and_bias)
            return value, *vjp(cotangent)

        return both

    def batch(function):
        return lambda x, y, w, g: function(x, weight_and_bias, y, w, g)

    plain, remat = batch(value_and_grads_of(losses)), batch(value_and_grads_of(jax.checkpoint(losses)))
    for transformed in (
        jax.jit(jax.vmap(plain)),
        lambda *xs: jax.lax.scan(lambda _, x: (None, plain(*x)), None, xs)[1],
        jax.jit(jax.vmap(remat)),
    ):
        value, dx, (dW, db) = transformed(*batches)
        result = Result(value.reshape(24), dx.reshape(24, -1), dW.sum(axis=0), db.sum(axis=0))
        assert_close(result, exact._replace(d_token_weights=None))


@pytest.mark.parametrize("names", [EVERYTHING, f"none+{EVERYTHING}"], ids=["mean", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_a_token_of_weight_zero_may_hold_nan(implementation, names):
    case = make_case(names)
    p, (T, _) = case.problem, case.problem.hidden.shape
    absent = case.options["token_weights"] == 0
    assert 3 < jnp.sum(absent) < T / 2
    poisoned = p._replace(hidden=jnp.where(absent[:, None], jnp.nan, p.hidden))
    options = {"num_chunks": 4, "implementation": implementation, "frozen": ("token_weights",)} | case.options
    result = value_and_grads(poisoned, case.cotangent, **options)
    exact = oracle(p, case.cotangent, **case.options)._replace(d_token_weights=None)
    assert_close(result, exact)
    assert np.all(result.d_hidden[absent] == 0)


@pytest.mark.parametrize("garbage", [np.nan, 3e38])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_a_token_of_weight_zero_may_hold_garbage_also_where_weights_are_differentiated(
    implementation, reduction, garbage
):
    """Its own loss is then not needed; the losses of other tokens of weight 0 are."""
    p = problem(ignored=0.0)
    weights = jnp.ones(33).at[4:9].set(0.0)
    hidden = p.hidden.at[6].set(garbage)
    cotangent = jnp.arange(1.0, 34.0) if reduction == "none" else 1.0

    def objective(hidden, weight, weights):
        options = {"num_chunks": 4, "implementation": implementation, "reduction": reduction}
        return jnp.sum(cotangent * lm_head_loss(hidden, weight, p.labels, token_weights=weights, **options))

    dx, dW, dw = jax.jit(jax.grad(objective, (0, 1, 2)))(hidden, p.weight, weights)
    exact = oracle(p, np.asarray(cotangent), token_weights=weights, reduction=reduction)
    others = np.arange(33) != 6
    assert_close((dx[others], dW, dw[others]), (exact.d_hidden[others], exact.d_weight, exact.d_token_weights[others]))
    assert np.all(dx[6] == 0)
    assert np.isfinite(dw[6])


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_weights_that_are_all_zero_make_the_mean_zero(implementation):
    case = make_case(EVERYTHING)
    options = case.options | {"token_weights": jnp.zeros(33), "num_chunks": 4, "implementation": implementation}
    result = value_and_grads(case.problem, **options)
    chex.assert_trees_all_equal(result, jax.tree.map(np.zeros_like, result))


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_masks_are_token_weights(implementation):
    p = problem()
    mask = jax.random.uniform(jax.random.key(1), (33,)) < 0.5
    loss = functools.partial(lm_head_loss, *p, num_chunks=4, implementation=implementation)
    for weights in (mask, mask.astype(jnp.int32), np.asarray(mask), mask.tolist(), mask.astype(jnp.bfloat16)):
        np.testing.assert_allclose(loss(token_weights=weights), oracle(p, token_weights=mask).loss, rtol=1e-6)


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_gradients_have_the_dtypes_of_their_operands(implementation):
    """A float32 master weight and bias, bfloat16 hidden states and token weights."""
    case = make_case(EVERYTHING, dtype=jnp.bfloat16)
    weights = jnp.round(case.options["token_weights"] * 4) / 4  # exact in bfloat16
    options = case.options | {"token_weights": weights.astype(jnp.bfloat16)}
    options["bias"] = options["bias"].astype(jnp.float32)
    master = case.problem._replace(weight=case.problem.weight.astype(jnp.float32))
    result = value_and_grads(master, num_chunks=4, implementation=implementation, **options)  # asserts the dtypes
    exact = oracle(case.problem, **options)
    baseline = same_dtype_baseline(case.problem, **options)
    weights_gradient = relative_error(result.d_token_weights, exact.d_token_weights)
    assert weights_gradient < jnp.finfo(jnp.bfloat16).eps
    assert_as_exact(result._replace(d_token_weights=exact.d_token_weights), exact, baseline, jnp.bfloat16)


@pytest.mark.parametrize("names", ["", "sum+", "none+", "normalizer+"], ids=["mean", "sum", "none", "normalizer"])
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_float64_is_float64_with_everything(implementation, names):
    with jax.enable_x64():
        case = make_case(names + EVERYTHING, dtype=jnp.float64)
        options = case.options | {"token_weights": case.options["token_weights"].astype(jnp.float64)}
        result = value_and_grads(case.problem, case.cotangent, num_chunks=4, implementation=implementation, **options)
    exact = oracle(case.problem, case.cotangent, **options)
    assert_close(result._replace(metrics=None), exact._replace(metrics=None), 1e-13)
    assert_close(result.metrics, exact.metrics)


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_per_token_losses_keep_the_leading_dimensions(implementation):
    case = make_case(f"none+{EVERYTHING}", T=24)
    x, weight, y = case.problem
    weights = case.options["token_weights"].reshape(2, 3, 4)
    options = case.options | {"num_chunks": 5, "implementation": implementation}
    loss = jax.jit(lambda x, y, w: lm_head_loss(x, weight, y, **options | {"token_weights": w})[0])
    losses = loss(x.reshape(2, 3, 4, -1), y.reshape(2, 3, 4), weights)
    assert_close(losses, oracle(case.problem, **case.options).loss.reshape(2, 3, 4))
    assert_close(loss(x[1], y[1], weights[0, 0, 1]), losses[0, 0, 1])  # no leading dimension at all


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_no_tokens_at_all_with_everything(implementation):
    for names in (EVERYTHING, f"none+{EVERYTHING}"):
        case = make_case(names)
        nothing = Problem(case.problem.hidden[:0], case.problem.weight, case.problem.labels[:0])
        options = case.options | {"token_weights": jnp.zeros(0), "num_chunks": 4, "implementation": implementation}
        result = value_and_grads(nothing, **options)
        chex.assert_trees_all_equal(result, jax.tree.map(np.zeros_like, result))


@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA)
def test_a_bad_label_in_a_jitted_program_spoils_only_its_own_loss(implementation):
    case = make_case("none+z_loss+bias")
    p = case.problem
    loss = jax.jit(functools.partial(lm_head_loss, num_chunks=4, implementation=implementation, **case.options))
    losses = loss(p.hidden, p.weight, p.labels.at[5].set(97))
    np.testing.assert_array_equal(jnp.isnan(losses), jnp.arange(33) == 5)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])
def test_a_mask_may_cover_labels_that_are_none(implementation, reduction):
    """Padding marked by a mask of 0 and 1 often has label -1, and weights that were normalised over nothing are NaN."""
    p = problem(ignored=0.0)
    mask = jnp.ones(33).at[4:9].set(0.0)
    options = {"num_chunks": 4, "implementation": implementation, "reduction": reduction}
    padded = p.labels.at[4:9].set(-1)
    expected = lm_head_loss(*p, token_weights=mask, **options)
    np.testing.assert_array_equal(lm_head_loss(p.hidden, p.weight, padded, token_weights=mask, **options), expected)
    jitted = jax.jit(lambda labels, mask: lm_head_loss(p.hidden, p.weight, labels, token_weights=mask, **options))
    np.testing.assert_allclose(jitted(padded, mask), expected, rtol=1e-6)
    ignored = p.labels.at[4:9].set(IGNORE)
    gradient = jax.jit(jax.grad(lambda mask: jnp.sum(jitted(ignored, mask))))(mask.at[5].set(jnp.nan))
    assert jnp.all(jnp.isfinite(gradient))


@pytest.mark.parametrize("names", [EVERYTHING, f"none+{EVERYTHING}"], ids=["mean", "none"])
@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])
def test_strict_promotion_and_nan_checks(implementation, names):
    case = make_case(names, dtype=jnp.bfloat16)
    options = {"num_chunks": 4, "implementation": implementation} | case.options

    def objective(hidden, weight):
        loss, metrics = lm_head_loss(hidden, weight, case.problem.labels, **options)
        return 3 * jnp.sum(loss), metrics

    with jax.numpy_dtype_promotion("strict"), jax.debug_nans(True):
        gradients, _ = jax.grad(objective, (0, 1), has_aux=True)(case.problem.hidden, case.problem.weight)
        jitted, _ = jax.jit(jax.grad(objective, (0, 1), has_aux=True))(case.problem.hidden, case.problem.weight)
    for eager, compiled in zip(gradients, jitted, strict=True):
        assert relative_error(eager, compiled) < 1e-2


def test_second_derivatives_where_a_weight_or_a_cotangent_is_zero():
    p = problem(T=8, D=6, V=31, ignored=0.0)
    weights = jnp.ones(8).at[3].set(0.0)
    direction = jax.random.normal(jax.random.key(3), p.hidden.shape)

    def of_weights(weights, implementation, reduction):
        def loss(hidden):
            options = {"reduction": reduction, "implementation": implementation, "num_chunks": 2}
            return jnp.sum(lm_head_loss(hidden, p.weight, p.labels, token_weights=weights, **options))

        return jnp.sum(jax.grad(loss)(p.hidden) * direction)

    def of_cotangent(cotangent, implementation):
        losses = functools.partial(lm_head_loss, reduction="none", implementation=implementation, num_chunks=2)
        return jnp.sum(jax.vjp(lambda x: losses(x, p.weight, p.labels), p.hidden)[1](cotangent)[0] * direction)

    for reduction in ("sum", "none"):
        exact = jax.grad(of_weights)(weights, "reference", reduction)
        np.testing.assert_allclose(jax.grad(of_weights)(weights, "xla", reduction), exact, rtol=1e-4, atol=1e-5)
    exact = jax.grad(of_cotangent)(jnp.zeros(8), "reference")
    np.testing.assert_allclose(jax.grad(of_cotangent)(jnp.zeros(8), "xla"), exact, rtol=1e-4, atol=1e-5)
    assert jnp.all(exact != 0)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_interpret"])
def test_entropy_where_the_label_is_masked_out(implementation):
    p = problem(T=4, ignored=0.0)
    bias = jnp.zeros(97).at[p.labels[0]].set(-jnp.inf)
    _, metrics = lm_head_loss(*p, bias=bias, with_metrics=True, implementation=implementation)
    z = np.asarray(p.hidden @ p.weight.T, np.float64) + np.asarray(bias)
    softmax = np.exp(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
    entropy = -np.sum(softmax * np.log(np.where(softmax > 0, softmax, 1)), axis=1)
    np.testing.assert_allclose(metrics.mean_entropy, entropy.mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("softcap", [30.0, 40.0, 41.0, 1000.0])
@pytest.mark.parametrize("scale", [1.0, 3.0, 30.0])
@pytest.mark.parametrize("implementation", ALL_BUT_FUSED_XLA[1:])
def test_softcaps_of_every_size(implementation, scale, softcap, dtype):
    """A cap of some tens lets a kernel sum without a maximum, which must not cost digits; a large one bends nothing."""
    p, options = problem(*sizes(implementation), dtype, scale=scale), {"logit_softcap": softcap}
    result = value_and_grads(p, num_chunks=4, implementation=implementation, **options)
    assert_as_exact(result, oracle(p, **options), same_dtype_baseline(p, **options), dtype)
