"""The LM-head benchmark: forward and backward of every implementation beside its floor, the three bare GEMMs."""

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from jaxchunk import device_memory, lm_head_loss, plotting
from jaxchunk.bench import accuracy, peers
from jaxchunk.bench.accuracy import Case
from jaxchunk.bench.lm_head_summary import Program, summarize, table
from jaxchunk.device_memory import compile_if_it_fits
from jaxchunk.errors import InputError
from jaxchunk.lm_head import Head, choose_implementation, dispatch
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig, Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.plotting import AUTODIFF, FLOOR
from jaxchunk.run_dir import RunDirectory
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"logit_softcap": 30.0, "z_loss": 1e-4, "label_smoothing": 0.1},  # and token_weights
    "metrics": {"with_metrics": True},
    "bias": {},
    "dv": {"weight_layout": "dv"},
    "per_token": {"reduction": "none"},
}
_ABOUT_PEERS = (
    "every call casts the float32 weight to {dtype}; the floor is given the cast one. Errors: relative norms against "
    "float32 arithmetic on {tokens} tokens; confident labels are the argmax of logits x8."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMHeadBenchConfig(BenchConfig):
    """Forward and backward of the LM head at one shape."""

    tokens: int = 1024
    """T, rows of the hidden states."""
    width: int = 128
    """D, width of the hidden states."""
    vocab: int = 4096
    """V, vocabulary size."""
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Chunk counts to measure."""
    implementations: tuple[str, ...] = ("xla",)
    """Implementations to measure."""
    cases: tuple[str, ...] = ("plain",)
    """How the loss is called: plain; options (softcap, z-loss, smoothing and token weights at once); metrics; bias
    (with its gradient); dv (a weight [D, V]); per_token (reduction "none"). Cases are compared with plain."""
    peers: tuple[str, ...] = ()
    """LM heads of others to measure beside ours: liger, cce, quack, torch_compile, torch_eager, or all (that can be
    imported here). With any, the errors of loss and gradients are measured too, on 2048 tokens."""
    vocab_devices: int = 1
    """More than 1: also measure the plain case with the vocabulary sharded over so many GPUs."""
    dtype: str = "float32"
    """Dtype of the hidden states and of the computation; the weight is float32, as a trainer's master copy."""
    window_s: float = 1.0
    """Least length of one measurement, seconds of back-to-back calls."""


def default_config(platform: str) -> LMHeadBenchConfig:
    """The paper's training shape (Qwen2-0.5B, 64 x 1024 tokens) on a GPU, the tiny model's on a CPU."""
    if platform == "gpu":
        return LMHeadBenchConfig(
            tokens=65536,
            width=896,
            vocab=151936,
            chunks=(1, 4, 8, 16),
            implementations=("fused", "pallas", "xla") if dispatch.is_hopper() else ("pallas", "xla"),
            dtype="bfloat16",
            window_s=3.0,  # the ends of a window cost some readings of a counter that can be dear
        )
    return LMHeadBenchConfig(window_s=0.5, settle_s=0.0)


def validate(config: LMHeadBenchConfig) -> None:
    """Refuses what cannot run.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_common(config)
    for name in ("tokens", "width", "vocab"):
        if getattr(config, name) < 1:
            raise InputError(f"--{name} is {getattr(config, name)}; it must be at least 1")
    if not 0 < config.window_s < math.inf:
        raise InputError(f"--window_s is {config.window_s}; it must be greater than 0, and finite")
    if not config.chunks or min(config.chunks) < 1:
        raise InputError(f"--chunks is {' '.join(map(str, config.chunks))}; give counts of at least 1")
    unknown = [case for case in config.cases if case not in CASES]
    if unknown or not config.cases:
        raise InputError(f"--cases is {' '.join(config.cases)}; choose from {', '.join(CASES)}")
    if not 1 <= config.vocab_devices <= len(jax.devices()) or config.vocab % config.vocab_devices:
        raise InputError(
            f"--vocab_devices is {config.vocab_devices}; JAX sees {len(jax.devices())} device(s), and their number "
            f"must divide --vocab {config.vocab}"
        )
    if config.dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype is {config.dtype}; it must be bfloat16 or float32")
    for implementation in config.implementations:
        try:
            choose_implementation(
                implementation,
                compute_dtype=config.dtype,
                head=Head(config.width, config.vocab // config.vocab_devices),
            )
        except ValueError as error:
            raise InputError(f"--implementations: {error}") from None
    peers.check(config.peers)


def run(config: LMHeadBenchConfig) -> None:
    """Measures, and writes records, summary, table and figure into the run's directory as it goes.

    Raises:
      InputError: a flag is out of its domain, the directory cannot be used, or nothing fits in memory.
    """
    validate(config)
    device = jax.devices()[0]
    programs: list[Program] = []

    def variants() -> list[Variant]:
        shape = f"T={config.tokens} D={config.width} V={config.vocab} {config.dtype}"
        print(f"{device.device_kind}: {shape}; compiling ...")
        programs.extend(compile_variants(config, device_memory.limit_bytes(device)))
        if not programs:
            raise InputError(f"nothing fits in the device's memory at --tokens {config.tokens}; use fewer")
        return [program.variant for program in programs]

    def report(directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
        rows = summarize(measurements, programs)
        directory.write_json("summary.json", rows)
        (directory.path / "table.md").write_text(table(rows) + "\n")
        lines = [table(rows)]
        if config.peers:
            lines.append(_ABOUT_PEERS.format(tokens=min(config.tokens, accuracy.MOST_TOKENS), dtype=config.dtype))
        if rows[0]["energy_null_reason"] is not None:
            lines.append(f"energy null: {rows[0]['energy_null_reason']}")
        return "\n".join([*lines, f"figure: {plotting.plot_lm_head(directory.path)}"])

    protocol = harness.protocol_of(config, window_s=config.window_s)
    harness.run(Benchmark("lm-head", config, protocol, variants, report, num_devices=config.vocab_devices))


def compile_variants(config: LMHeadBenchConfig, limit_bytes: int | None) -> Iterator[Program]:
    """Compiles floor, baseline and implementations, then loads peers; what does not fit is left out with a word."""
    keys = jax.random.split(jax.random.key(config.seed), 3)
    dtype = jnp.dtype(config.dtype)
    hidden = jax.random.normal(keys[0], (config.tokens, config.width), dtype)
    weight = 0.02 * jax.random.normal(keys[1], (config.vocab, config.width))
    labels = jax.random.randint(keys[2], (config.tokens,), 0, config.vocab)
    operands = (hidden, weight, labels)
    slices = accuracy.cases(*operands) if config.peers else None
    yield from _compile(FLOOR, three_gemms, (hidden, weight.astype(dtype)), limit_bytes)
    yield from _compile(AUTODIFF, jax.value_and_grad(unchunked_loss, (0, 1)), operands, limit_bytes, slices=slices)
    yield from _ours(config, operands, limit_bytes, slices)
    if slices is not None:
        for peer in peers.load(config.peers, operands, slices):
            variant = Variant(peer.name, peer.call)
            yield Program(variant, peer.temporary_bytes, accuracy=peer.accuracy, is_peer=True)


def _ours(
    config: LMHeadBenchConfig,
    operands: tuple[Array, Array, Array],
    limit_bytes: int | None,
    slices: Mapping[str, Case] | None,
) -> Iterator[Program]:
    """Implementations and chunk counts in all cases."""
    for implementation in config.implementations:
        for num_chunks in config.chunks if implementation != "reference" else (1,):
            plain = variant_name(implementation, num_chunks)
            fixed = {"implementation": implementation, "num_chunks": num_chunks}
            for case in config.cases:
                name = plain if case == "plain" else f"{plain}, {case}"
                options: dict[str, Any] = {}
                if case == "plain":
                    options = {"slices": slices, "one_chunk": variant_name(implementation, 1)}
                try:
                    yield from _compile(name, *_case(case, operands, fixed), limit_bytes, plain, **options)
                except ValueError as error:  # an option that this implementation refuses
                    _logger.warning("%s is left out: %s", name, error)
            if config.vocab_devices > 1:
                sharded, placed = _over_devices(config.vocab_devices, operands, fixed)
                name = f"{plain}, vocabulary over {config.vocab_devices} GPUs"
                yield from _compile(name, sharded, placed, limit_bytes, plain)


def variant_name(implementation: str, num_chunks: int) -> str:
    """What the plain case of an implementation is called in records and tables."""
    return f"{implementation}, {chunks_in_words(num_chunks)}"


def three_gemms(hidden: Float[Array, "T D"], weight: Float[Array, "V D"]) -> tuple[Array, Array, Array]:
    """The arithmetic that no implementation can avoid: logits, dX and an fp32 dW (with the logits for dlogits)."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    logits = jnp.matmul(hidden, weight.T, precision=precision)
    d_hidden = jnp.matmul(logits, weight, precision=precision)
    d_weight = jnp.matmul(logits.T, hidden, precision=precision, preferred_element_type=jnp.float32)
    return logits, d_hidden, d_weight


def unchunked_loss(
    hidden: Float[Array, "T D"], weight: Float[Array, "V D"], labels: Int[Array, " T"]
) -> Float[Array, ""]:
    """What people write without jaxchunk: all logits at once, optax's loss, gradients by autodiff."""
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None
    logits = jnp.matmul(hidden, weight.astype(hidden.dtype).T, precision=precision)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).astype(jnp.float32).mean()


def _case(case: str, operands: tuple[Array, Array, Array], fixed: dict[str, Any]) -> tuple[Any, tuple[Array, ...]]:
    """Value and gradients of a case as a function, and what it takes."""
    hidden, weight, labels = operands
    options, keys = fixed | CASES[case], jax.random.split(jax.random.key(1), 2)
    if case == "options":
        token_weights = jax.random.uniform(keys[0], labels.shape)
        loss = lambda x, W, y, w: lm_head_loss(x, W, y, token_weights=w, **options)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1)), (hidden, weight, labels, token_weights)
    if case == "bias":
        bias = jax.random.normal(keys[0], (weight.shape[0],))
        loss = lambda x, W, y, b: lm_head_loss(x, W, y, bias=b, **options)  # noqa: E731
        return jax.value_and_grad(loss, (0, 1, 3)), (hidden, weight, labels, bias)
    if case == "per_token":
        cotangent = jax.random.normal(keys[0], labels.shape)
        loss = lambda x, W, y, ct: jnp.sum(ct * lm_head_loss(x, W, y, **options))  # noqa: E731
        return jax.value_and_grad(loss, (0, 1)), (hidden, weight, labels, cotangent)
    if case == "dv":
        weight = weight.T.copy()
    loss = functools.partial(lm_head_loss, **options)
    return jax.value_and_grad(loss, (0, 1), has_aux=case == "metrics"), (hidden, weight, labels)


def _over_devices(
    num_devices: int, operands: tuple[Array, Array, Array], fixed: dict[str, Any]
) -> tuple[Any, tuple[Array, ...]]:
    """The plain case with the vocabulary sharded over devices and the tokens on each of them."""
    mesh = jax.make_mesh((num_devices,), ("vocab",), axis_types=(AxisType.Explicit,))
    specs = PartitionSpec(), PartitionSpec("vocab"), PartitionSpec()
    placed = tuple(jax.device_put(o, NamedSharding(mesh, s)) for o, s in zip(operands, specs, strict=True))
    return jax.value_and_grad(functools.partial(lm_head_loss, vocab_axis="vocab", **fixed), (0, 1)), placed


def _compile(
    name: str,
    function: Any,
    arguments: tuple[Array, ...],
    limit_bytes: int | None,
    plain: str | None = None,
    *,
    one_chunk: str | None = None,
    slices: Mapping[str, Case] | None = None,
) -> Iterator[Program]:
    jitted = jax.jit(function)
    compiled = compile_if_it_fits(lambda: jitted.lower(*arguments).compile(), limit_bytes)
    if isinstance(compiled, str):
        _logger.warning("%s is left out: %s", name, compiled)
        return
    program, memory = compiled
    variant = Variant(name, lambda: program(*arguments), tuple(range(len(arguments[0].sharding.device_set))))
    measured = None if slices is None else accuracy.measure(jitted, slices)
    yield Program(variant, memory.temporary_bytes, plain, one_chunk, measured)
