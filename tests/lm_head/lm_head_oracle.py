"""What the loss is judged by: problems, a float64 oracle in NumPy, and the unchunked computation in the same dtype.

`oracle`, `same_dtype_baseline` and `value_and_grads` (the loss under test) take the same options and return the same
`Result`, so that a test is one call of each and a comparison.
"""

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import lm_head_loss
from jaxchunk.lm_head.kernels import Exponentials, xla

IGNORE = -100
CHUNKED = [
    "xla",
    "pallas_interpret",
    "fused_xla",
    *(pytest.param(name, marks=pytest.mark.gpu) for name in ("pallas", "fused")),
]
ALL = ["reference", *CHUNKED]
ALL_BUT_FUSED_XLA = [
    i for i in ALL if i != "fused_xla"
]  # for the time it takes, where test_label_offset.py has the like
DTYPES = [jnp.float32, jnp.bfloat16]


def sizes(implementation: str) -> tuple[int, int, int]:
    """T, D, V that chunks do not divide; a GPU needs enough rows for the same kind of GEMM as the baseline."""
    return {"pallas": (2001, 64, 1187), "fused": (2001, 64, 1184)}.get(implementation, (33, 24, 97))


class Problem(NamedTuple):
    hidden: jax.Array
    weight: jax.Array
    labels: jax.Array


def has_array(lowered: str, *shape: int) -> bool:
    """Whether a lowered program has floats of this shape anywhere outside of its kernels."""
    return re.search(rf"tensor<{'x'.join(map(str, shape))}x(?:bf16|f32)>", lowered) is not None


def assert_kernel_as_plain(kernel: Callable[..., Exponentials], *operands: Any, unstored: bool = True) -> None:
    """A kernel of the fused implementation against the one in plain jnp, and against itself where it stores no E."""
    expected = jax.jit(xla.exponentials, static_argnums=5)(*operands)
    found = kernel(*operands)
    np.testing.assert_allclose(found.E.astype(jnp.float32), expected.E.astype(jnp.float32), rtol=1e-2)
    for value, wanted in zip(found[1:], expected[1:], strict=True):
        if wanted is not None:
            np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-4)
    if unstored:
        without_E = kernel(*operands, store=False)
        assert without_E.E is None
        jax.tree.map(  # XLA may add in another order
            functools.partial(np.testing.assert_allclose, rtol=1e-6), without_E[1:], found[1:]
        )


class Options(NamedTuple):
    """The options that change a number, with the defaults of `lm_head_loss`."""

    reduction: str = "mean"
    token_weights: jax.Array | None = None
    normalizer: float | None = None
    bias: jax.Array | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float | None = None
    logit_scale: float = 1.0
    weight_layout: str = "vd"
    ignore_index: int = IGNORE
    with_metrics: bool = False


class Metrics(NamedTuple):
    num_valid_tokens: np.ndarray
    accuracy: np.ndarray
    mean_lse: np.ndarray
    z_loss: np.ndarray
    mean_entropy: np.ndarray


class Result(NamedTuple):
    """Loss (one for each token under reduction="none") and gradients; None for what the options do not give."""

    loss: np.ndarray
    d_hidden: np.ndarray
    d_weight: np.ndarray
    d_bias: np.ndarray | None = None
    d_token_weights: np.ndarray | None = None
    metrics: Metrics | None = None


def problem(T=33, D=24, V=97, dtype=jnp.float32, *, scale=1.0, ignored=0.2, seed=0) -> Problem:
    """Random operands whose logits have a standard deviation of `scale`; a share of the labels is ignored."""
    keys = jax.random.split(jax.random.key(seed), 4)
    hidden = jax.random.normal(keys[0], (T, D)).astype(dtype)
    weight = (scale * jax.random.normal(keys[1], (V, D)) / np.sqrt(D)).astype(dtype)
    labels = jax.random.randint(keys[2], (T,), 0, V)
    return Problem(hidden, weight, jnp.where(jax.random.uniform(keys[3], (T,)) < ignored, IGNORE, labels))


def value_and_grads(
    p: Problem, cotangent=1.0, *, frozen: tuple[str, ...] = (), taken_twice: int = 0, **options
) -> Result:
    """The loss under test in a jitted program, differentiated for every operand that is given and not `frozen`.

    Metrics must say that `taken_twice` tokens had their exponentials taken twice.
    """
    arrays, settings = _arrays_and_settings(options)
    trained = {n: arrays.pop(n) for n in ("bias", "token_weights") if n in arrays and n not in frozen}
    operands = (p.hidden, p.weight, trained)
    (_, (loss, metrics)), gradients = loss_program(settings)(*operands, p.labels, cotangent, arrays)
    assert loss.dtype == jnp.promote_types(p.hidden.dtype, jnp.float32)
    assert loss.shape == (p.labels.shape if options.get("reduction") == "none" else ())
    assert jax.tree.map(lambda a: a.dtype, gradients) == jax.tree.map(lambda a: a.dtype, operands)
    if metrics is not None:
        assert metrics.num_valid_tokens.dtype == jnp.int32
        assert metrics.num_taken_twice == taken_twice
        metrics = Metrics(*(getattr(metrics, name) for name in Metrics._fields))
    dx, dW, others = gradients
    return _float64(Result(loss, dx, dW, others.get("bias"), others.get("token_weights"), metrics))


@functools.cache  # so that calls which differ in the values of their operands only compile once
def loss_program(settings: tuple[tuple[str, Any], ...]):
    """`lm_head_loss` with these keywords, and its gradients, as `value_and_grads` calls it."""
    settings = dict(settings)

    def objective(hidden, weight, trained, labels, cotangent, arrays):
        output = lm_head_loss(hidden, weight, labels, **trained, **arrays, **settings)
        loss, metrics = output if settings.get("with_metrics") else (output, None)
        return jnp.sum(cotangent * loss), (loss, metrics)

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2), has_aux=True))


def _arrays_and_settings(options: dict[str, Any]) -> tuple[dict[str, Any], tuple[tuple[str, Any], ...]]:
    """Options that are traced, where they are given, and those that shape the program and are not the defaults."""
    arrays = {n: options[n] for n in ("bias", "token_weights", "normalizer") if options.get(n) is not None}
    others = [(name, value) for name, value in options.items() if name not in arrays]
    defaults = Options._field_defaults
    return arrays, tuple(sorted((name, value) for name, value in others if defaults.get(name, ...) != value))


def oracle(p: Problem, cotangent=1.0, **options) -> Result:
    """Loss, gradients and metrics in float64 from the formulas, not from autodiff."""
    o = Options(**options)
    x, W = (np.asarray(a, np.float64) for a in (p.hidden, p.weight if o.weight_layout == "vd" else p.weight.T))
    y, (T, V) = np.asarray(p.labels), (x.shape[0], W.shape[0])
    w = np.ones(T) if o.token_weights is None else np.asarray(o.token_weights, np.float64)
    valid = y != o.ignore_index
    is_label = np.arange(V) == np.where(valid, y, -1)[:, None]
    u = o.logit_scale * (x @ W.T) + (0 if o.bias is None else np.asarray(o.bias, np.float64))
    z, slope = u, 1.0
    if o.logit_softcap is not None:
        z, e = o.logit_softcap * np.tanh(u / o.logit_softcap), np.exp(-2 * np.abs(u / o.logit_softcap))
        slope = 4 * e / (1 + e) ** 2  # 1 - tanh^2 cancels where the cap is reached
    z_max = z.max(axis=1, keepdims=True)
    lse = z_max[:, 0] + np.log(np.exp(z - z_max).sum(axis=1))
    z_y, softmax = np.sum(z, axis=1, where=is_label), np.exp(z - lse[:, None])
    # lse - z_y and softmax_y - 1 would cancel where the label stands 30 nats above the rest.
    above = np.logaddexp.reduce(np.where(is_label, -np.inf, z), axis=1) - z_y
    cross_entropy = np.logaddexp(0, above)
    residual = np.where(is_label, np.expm1(-cross_entropy)[:, None], softmax)  # softmax - is_label

    smoothing = o.label_smoothing
    per_token = cross_entropy + smoothing * (z_y - z.mean(axis=1)) + o.z_loss * lse**2
    dz = residual + smoothing * is_label - smoothing / V + (2 * o.z_loss * lse)[:, None] * softmax

    denominator = 1.0 if o.reduction != "mean" else w[valid].sum() if o.normalizer is None else float(o.normalizer)
    share = valid * (1 / denominator if denominator else 0.0)
    loss = share * w * per_token if o.reduction == "none" else np.sum(share * w * per_token)
    du = (cotangent * share * w)[:, None] * dz * slope
    dW = o.logit_scale * du.T @ x
    dw = cotangent * share * (per_token - (loss if o.reduction == "mean" and o.normalizer is None else 0))

    counted = valid & (w != 0)

    def mean(values):
        return values[counted].mean() if counted.any() else 0.0

    correct, entropy = z_y >= z.max(axis=1), lse - np.sum(softmax * z, axis=1)
    metrics = Metrics(counted.sum(), mean(correct), mean(lse), o.z_loss * mean(lse**2), mean(entropy))
    return Result(
        loss,
        o.logit_scale * du @ W,
        dW if o.weight_layout == "vd" else dW.T,
        None if o.bias is None else du.sum(axis=0),
        None if o.token_weights is None else dw,
        metrics if o.with_metrics else None,
    )


def same_dtype_baseline(p: Problem, cotangent=1.0, **options) -> Result:
    """What people write: logits in the operands' dtype, options and statistics in float32, autodiff, unchunked."""
    arrays, settings = _arrays_and_settings(options)
    operands = (p.hidden, p.weight, arrays.get("bias"), arrays.get("token_weights"))
    gradients = _baseline_program(settings)
    (_, (loss, metrics)), gradients = gradients(*operands, p.labels, cotangent, arrays.get("normalizer"))
    return _float64(Result(loss, *gradients, metrics))


@functools.cache
def _baseline_program(settings: tuple[tuple[str, Any], ...]):
    o = Options(**dict(settings))

    def objective(hidden, weight, bias, token_weights, labels, cotangent, normalizer):
        info, valid = jnp.finfo(hidden.dtype), labels != o.ignore_index
        W = weight if o.weight_layout == "dv" else weight.T
        logits = jnp.dot(hidden, W, precision="highest", preferred_element_type=jnp.float32)
        # Logits as they are in memory; XLA would elide a plain cast to bfloat16 and back.
        logits = jax.lax.reduce_precision(logits, info.nexp, info.nmant) * o.logit_scale
        if bias is not None:
            logits += bias.astype(jnp.float32)[None]
        if o.logit_softcap is not None:
            logits = o.logit_softcap * jnp.tanh(logits / o.logit_softcap)
        lse = jax.nn.logsumexp(logits, axis=1)
        picked = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[:, None], axis=1)[:, 0]
        per_token = (1 - o.label_smoothing) * (lse - picked) + o.z_loss * lse**2
        if o.label_smoothing:
            per_token += o.label_smoothing * (lse - jnp.mean(logits, axis=1))
        row_weights = jnp.where(valid, 1.0 if token_weights is None else token_weights, 0)
        loss = jnp.where(valid, row_weights * per_token, 0)
        if o.reduction != "none":
            loss = jnp.sum(loss)
        if o.reduction == "mean":
            loss /= jnp.sum(row_weights) if normalizer is None else normalizer
        metrics = _metrics(o, logits, lse, picked, row_weights != 0) if o.with_metrics else None
        return jnp.sum(cotangent * loss), (loss, metrics)

    return jax.jit(jax.value_and_grad(objective, (0, 1, 2, 3), has_aux=True))


def _metrics(o: Options, logits, lse, picked, counted) -> Metrics:
    softmax = jax.nn.softmax(logits, axis=1)
    correct = (picked >= jnp.max(logits, axis=1)).astype(jnp.float32)
    entropy = lse - jnp.sum(softmax * logits, axis=1)
    accuracy, mean_lse, z_loss, mean_entropy = (
        jnp.mean(a, where=counted) for a in (correct, lse, o.z_loss * lse**2, entropy)
    )
    return Metrics(jnp.sum(counted), accuracy, mean_lse, z_loss, mean_entropy)


def _float64(result: Result) -> Result:
    return jax.tree.map(lambda a: np.asarray(a, np.float64), result)


def relative_error(value, exact) -> float:
    value, exact = np.asarray(value, np.float64), np.asarray(exact, np.float64)
    return float(np.linalg.norm(value - exact) / max(np.linalg.norm(exact), 1e-300))


def assert_close(result, exact, tolerance=2e-6) -> None:
    """Every leaf to a relative error in the 2-norm: for float32, where no baseline is needed to know what is due."""
    assert jax.tree.structure(result) == jax.tree.structure(exact)
    for (path, value), truth in zip(jax.tree.leaves_with_path(result), jax.tree.leaves(exact), strict=True):
        assert np.shape(value) == np.shape(truth), jax.tree_util.keystr(path)
        error = relative_error(value, truth)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)}: relative error {error:.3g}, allowed {tolerance:.3g}"


def assert_as_exact(result: Result, exact: Result, baseline: Result, dtype) -> None:
    """STYLE.md's rule: at most 2x (gradients) or 3x (loss) as wrong as the unchunked computation, plus an epsilon.

    The epsilon is that of the precision in which the quantity leaves the computation: the gradients' own dtype, and
    float32 for the loss, for the metrics and for the gradient of float32 `token_weights`, which is made of losses.
    """
    gradient, loss = (2, jnp.finfo(dtype).eps / 4), (3, jnp.finfo(jnp.float32).eps)
    rules = {"loss": loss, "d_hidden": gradient, "d_weight": gradient, "d_bias": gradient, "d_token_weights": loss}
    triples = [(name, rule, *(getattr(r, name) for r in (result, exact, baseline))) for name, rule in rules.items()]
    if exact.metrics is not None:
        triples += [(n, loss, *(getattr(r.metrics, n) for r in (result, exact, baseline))) for n in Metrics._fields]
    for name, (factor, epsilon), value, truth, unchunked in triples:
        assert (value is None) == (truth is None), name
        if truth is not None:
            error, allowed = relative_error(value, truth), factor * relative_error(unchunked, truth) + epsilon
            assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"
