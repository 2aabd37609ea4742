"""The scoring benchmark: log-probabilities of a prompt's tokens, our LM head in chunks beside all logits at once.

It begins at the hidden states: what the model does before them is the same for all. Weights are in the dtype of the
computation, as those of a model that only infers.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from jaxchunk import device_memory, plotting
from jaxchunk.bench import accuracy, scoring_peer
from jaxchunk.bench.lm_head_shapes import Shape, parse_shape
from jaxchunk.bench.scoring_summary import NOTE, Scoring, name_in, sentences, summarize, table
from jaxchunk.device_memory import compile_if_it_fits
from jaxchunk.errors import InputError, first_line
from jaxchunk.inference.scoring import head_chunks
from jaxchunk.lm_head import Head, choose_implementation, token_log_probs
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig, Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.plotting import BFLOAT16_LOGITS, FLOAT32_LOGITS, FLOOR
from jaxchunk.run_dir import RunDirectory
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
Operands = tuple[Float[Array, "T D"], Float[Array, "V D"], Int[Array, " T"]]
Score = Callable[[Array, Array, Array], Array]
"""Hidden states [T, D], weight [V, D], labels [T] int to log-probabilities [T] float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScoringBenchConfig(BenchConfig):
    """Scoring of a prompt from its hidden states."""

    shapes: tuple[str, ...] = ("2048x64x4096:1,8",)
    """Tokens x width x vocabulary : chunk counts, beside the one that `jaxchunk.inference.score` takes."""
    implementations: tuple[str, ...] = ("xla",)
    """Implementations of our LM head to measure."""
    peers: tuple[str, ...] = ()
    """Who else is measured: torch (eager, all logits in float32: three times their memory)."""
    dtype: str = "float32"
    """Dtype of hidden states and weight."""
    window_s: float = 1.0
    """Least length of one measurement, seconds of back-to-back calls."""


def default_config(platform: str) -> ScoringBenchConfig:
    """32k tokens at the heads of Qwen2-0.5B and Llama-3 8B on a GPU, a tiny shape on a CPU."""
    if platform == "gpu":
        dtype = "bfloat16"
        chosen = choose_implementation(compute_dtype=dtype, platform=platform).implementation
        return ScoringBenchConfig(
            shapes=("32768x896x151936:16,32,128", "32768x4096x128256:16,32,128"),
            implementations=tuple(dict.fromkeys((chosen, "xla"))),
            dtype=dtype,
            window_s=2.0,
        )
    return ScoringBenchConfig(window_s=0.2, settle_s=0.0)


def validate(config: ScoringBenchConfig) -> list[Shape]:
    """Refuses what cannot run.

    Returns:
      The shapes.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_common(config)
    shapes = [parse_shape(text) for text in config.shapes]
    if not shapes or len({shape.name for shape in shapes}) < len(shapes):
        raise InputError(f"--shapes is {' '.join(config.shapes)}; give each shape once, with all of its chunk counts")
    for shape in shapes:
        if min(*shape[:3], *shape.chunks) < 1:
            raise InputError(f"--shapes has {shape.name}:{','.join(map(str, shape.chunks))}; all must be at least 1")
    if not 0 < config.window_s < math.inf:
        raise InputError(f"--window_s is {config.window_s}; it must be greater than 0, and finite")
    if config.dtype not in ("bfloat16", "float32"):
        raise InputError(f"--dtype is {config.dtype}; it must be bfloat16 or float32")
    for implementation in config.implementations:
        for shape in shapes:
            try:
                head = Head(shape.width, shape.vocab)
                choose_implementation(implementation, compute_dtype=config.dtype, head=head)
            except ValueError as error:
                raise InputError(f"--implementations: {error}") from None
    scoring_peer.check(config.peers)
    return shapes


def run(config: ScoringBenchConfig) -> None:
    """Measures, and writes records, summary, table and figure into the run's directory as it goes.

    Raises:
      InputError: a flag is out of its domain, the directory cannot be used, or nothing fits in memory.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    shapes = validate(config)
    device = jax.devices()[0]
    scorings: list[Scoring] = []

    def variants() -> list[Variant]:
        print(f"{device.device_kind}: {' '.join(config.shapes)} {config.dtype}; compiling ...", flush=True)
        for shape in shapes:
            scorings.extend(compile_variants(config, shape, device_memory.limit_bytes(device)))
        if not scorings:
            raise InputError("nothing fits in the device's memory; give --shapes with fewer tokens")
        return [scoring.variant for scoring in scorings]

    def report(directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
        rows = summarize(measurements, scorings)
        directory.write_json("summary.json", rows)
        page = [table(rows), *sentences(rows), NOTE.format(rows=accuracy.MOST_TOKENS)]
        (directory.path / "table.md").write_text("\n\n".join(page) + "\n")
        if figure := plotting.plot_scoring(directory.path):
            page.append(f"figure: {figure}")
        return "\n".join(page)

    protocol = harness.protocol_of(config, window_s=config.window_s)
    harness.run(Benchmark("scoring", config, protocol, variants, report))


def compile_variants(config: ScoringBenchConfig, shape: Shape, limit_bytes: int | None) -> Iterator[Scoring]:
    """Compiles floor, all logits at once and ours, then loads the peer; what does not fit is left out with a word."""
    keys, dtype = jax.random.split(jax.random.key(config.seed), 3), jnp.dtype(config.dtype)
    hidden = jax.random.normal(keys[0], (shape.tokens, shape.width), dtype)
    weight = 0.02 * jax.random.normal(keys[1], (shape.vocab, shape.width), dtype)
    operands = hidden, weight, jax.random.randint(keys[2], (shape.tokens,), 0, shape.vocab)
    cases = _cases(operands)
    yield from _compile(shape, FLOOR, _logits_alone, operands, limit_bytes)
    for method, logits_dtype in ((FLOAT32_LOGITS, jnp.float32), (BFLOAT16_LOGITS, jnp.bfloat16)):
        if logits_dtype == jnp.float32 or dtype == logits_dtype:
            yield from _compile(shape, method, all_logits(logits_dtype), operands, limit_bytes, cases)
    chosen = choose_implementation(compute_dtype=dtype, head=Head(shape.width, shape.vocab)).implementation
    for implementation in config.implementations:
        default = head_chunks(shape.tokens, implementation)
        for num_chunks in sorted({default, *shape.chunks}) if implementation != "reference" else (1,):
            method = f"{implementation}, {chunks_in_words(num_chunks)}"
            is_default = (implementation, num_chunks) == (chosen, default)
            score = _ours(implementation, num_chunks)
            yield from _compile(shape, method, score, operands, limit_bytes, cases, is_default=is_default)
    if config.peers:
        peer = scoring_peer.load(*operands)
        if isinstance(peer, str):
            _logger.warning("%s is left out: %s", name_in(shape.name, scoring_peer.TORCH), peer)
            return
        try:
            errors = _errors(scoring_peer.evaluate, cases)
        except RuntimeError as error:  # torch's OutOfMemoryError is one
            _logger.warning("%s is left out: %s", name_in(shape.name, peer.name), first_line(error))
            return
        yield Scoring(_variant(shape, peer.name, peer.call), peer.temporary_bytes, errors, is_peer=True)


def all_logits(dtype: DTypeLike) -> Score:
    """What people write without jaxchunk: a GEMM whose result has this dtype, `log_softmax` in float32, a gather."""

    def score(hidden: Array, weight: Array, labels: Array) -> Array:
        logits = jnp.matmul(hidden, weight.T, precision=_precision(hidden), preferred_element_type=dtype)
        logits = jax.lax.optimization_barrier(logits)  # an array, whatever XLA could make of it
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
        return jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]

    return score


def _logits_alone(hidden: Array, weight: Array, labels: Array) -> Array:
    """The arithmetic that no way to score can avoid, with all logits written in the operands' dtype."""
    return jnp.matmul(hidden, weight.T, precision=_precision(hidden))


def _precision(hidden: Array) -> jax.lax.Precision | None:
    return jax.lax.Precision.HIGHEST if hidden.dtype == jnp.float32 else None


def _ours(implementation: str, num_chunks: int) -> Score:
    """As `jaxchunk.inference.score` calls it."""
    return lambda x, W, y: token_log_probs(x, W, y, num_chunks=num_chunks, implementation=implementation)


@dataclasses.dataclass(frozen=True)
class _Case:
    """Operands of the measured size, and exact log-probabilities of some of their rows."""

    operands: Operands
    rows: Int[Array, " S"]
    exact: Float[Array, " S"]


def _cases(operands: Operands) -> dict[str, _Case]:
    """The operands "random" as given (logits as after initialisation), and "confident": logits x8, argmax labels."""
    hidden, weight, labels = operands
    count = min(labels.size, accuracy.MOST_TOKENS)
    rows = jnp.arange(count) * labels.size // count
    sharp = accuracy.CONFIDENT_SCALE * hidden
    best = labels.at[rows].set(accuracy.most_probable(sharp[rows], weight))
    return {
        name: _Case((x, weight, y), rows, accuracy.exact_log_probs(x[rows], weight, y[rows]))
        for name, x, y in (("random", hidden, labels), ("confident", sharp, best))
    }


def _errors(score: Score, cases: dict[str, _Case]) -> dict[str, float]:
    """The largest error of a log-probability, in nats, by case."""
    return {
        name: float(jnp.max(jnp.abs(score(*case.operands)[case.rows] - case.exact))) for name, case in cases.items()
    }


def _variant(shape: Shape, method: str, call: Callable[[], object]) -> Variant:
    return Variant(name_in(shape.name, method), call, factors={"shape": shape.name, "method": method})


def _compile(
    shape: Shape,
    method: str,
    score: Score,
    operands: Operands,
    limit_bytes: int | None,
    cases: dict[str, _Case] | None = None,
    *,
    is_default: bool = False,
) -> Iterator[Scoring]:
    compiled = compile_if_it_fits(lambda: jax.jit(score).lower(*operands).compile(), limit_bytes)
    if isinstance(compiled, str):
        _logger.warning("%s is left out: %s", name_in(shape.name, method), compiled)
        return
    program, memory = compiled
    errors = None if cases is None else _errors(program, cases)
    variant = _variant(shape, method, lambda: program(*operands))
    yield Scoring(variant, memory.temporary_bytes, errors, is_default=is_default)
