"""The chunk count of a loss, chosen by measuring it on this device at these shapes."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

import jaxchunk
from jaxchunk import device_memory
from jaxchunk.device_memory import compile_if_it_fits
from jaxchunk.errors import InputError, first_line
from jaxchunk.lm_head import Head, choose_implementation, lm_head_loss
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.measuring.statistics import interval_of
from jaxchunk.measuring.tables import markdown
from jaxchunk.stop import StopRequest
from jaxchunk.telemetry import AnyMonitor, Monitor, open_monitor
from jaxchunk.tuning import choice_cache, contest
from jaxchunk.tuning.candidates import candidate_counts
from jaxchunk.tuning.objective import MEANINGS, Objective
from jaxchunk.tuning.race import Rules, Standing, verdict
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")


class Shapes(NamedTuple):
    """Shapes and dtypes of the loss's operands, hidden [..., D] and weight [V, D] or [D, V]."""

    hidden: jax.ShapeDtypeStruct
    weight: jax.ShapeDtypeStruct

    @property
    def num_tokens(self) -> int:
        """T."""
        return math.prod(self.hidden.shape[:-1])


@dataclasses.dataclass(frozen=True)
class Candidate:
    """What is known of one chunk count.

    Attributes:
      num_chunks: it.
      temporary_bytes: of its compiled program.
      windows: in which it was measured.
      time_s: median of a call, forward and backward.
      energy_j: median of a call, on the GPU's rail; None where it is not known or was not asked for.
      over_leader: its cost over the leader's, mean, low and high, minus 1; None where nothing was measured.
    """

    num_chunks: int
    temporary_bytes: int
    windows: int
    time_s: float | None
    energy_j: float | None
    over_leader: tuple[float, float, float] | None


@dataclasses.dataclass(frozen=True)
class ChunkChoice:
    """A chunk count, and why it was taken.

    Attributes:
      num_chunks: to give to `lm_head_loss`.
      reason: in a sentence, with numbers.
      objective: what was compared.
      num_tokens: T, that it was measured at.
      implementation: of the loss, that was measured.
      candidates: everything that was measured, by growing count.
      dropped: why other counts were not, by count.
      measuring_s: seconds of measuring, without compilation.
      cached: whether this was measured some other time.
    """

    num_chunks: int
    reason: str
    objective: Objective
    num_tokens: int
    implementation: str
    candidates: tuple[Candidate, ...]
    dropped: dict[str, str]
    measuring_s: float
    cached: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any], **changes: Any) -> "ChunkChoice":
        """From `as_dict`, perhaps through JSON."""
        candidates = tuple(
            Candidate(**row | {"over_leader": row["over_leader"] and tuple(row["over_leader"])})
            for row in record["candidates"]
        )
        return cls(**record | {"candidates": candidates} | changes)

    def table(self) -> str:
        """The candidates as a Markdown table."""
        columns: list[tuple[str, Callable[[Candidate], str]]] = [
            ("chunks", lambda c: f"**{c.num_chunks}**" if c.num_chunks == self.num_chunks else f"{c.num_chunks}"),
            ("windows", lambda c: str(c.windows)),
            ("ms", lambda c: "null" if c.time_s is None else f"{c.time_s * 1e3:.4g}"),
            ("J", lambda c: "null" if c.energy_j is None else f"{c.energy_j:.4g}"),
            ("cost / least", lambda c: _interval(c.over_leader)),
            ("temporaries, MB", lambda c: f"{c.temporary_bytes / 1e6:.1f}"),
        ]
        return markdown(self.candidates, columns)


def choose_num_chunks(
    hidden: Float[Array, "*batch D"] | jax.ShapeDtypeStruct,
    weight: Float[Array, "V D"] | jax.ShapeDtypeStruct,
    *,
    objective: Objective = "time",
    candidates: Sequence[int] | None = None,
    memory_budget_bytes: int | None = None,
    budget_s: float | None = None,
    time_if_no_energy: bool = False,
    frozen_weight: bool = False,
    use_cache: bool = True,
    cache_dir: Path | str | None = None,
    **options: Any,
) -> ChunkChoice:
    """The `num_chunks` of `lm_head_loss` that costs the least here, found by measuring loss and gradients.

    Candidates run in turn, in rounds of shuffled order, on random operands of the shapes and dtypes given; those
    that are shown to be worse than another drop out. It ends when one is left, when those left are within 0.5% of each
    other (then the one with the smallest temporaries is taken, and the reason says "no difference"), or when the
    time is up (likewise, among those estimated within 0.5%; the reason has the intervals). Compilation is not counted.

        choice = choose_num_chunks(hidden, weight)
        loss = lm_head_loss(hidden, weight, labels, num_chunks=choice.num_chunks)

    Args:
      hidden: hidden states or their shape and dtype; values are not read.
      weight: likewise, as `lm_head_loss` will get it; a `weight_layout` among the options tells which dimension is V.
      objective: "time", "energy" or "edp" (energy times time), of a call.
      candidates: counts to measure. Default: powers of two and counts half way between them, up to 32.
      memory_budget_bytes: most that the temporaries of a call may take. Default: what the device has.
      budget_s: time for measuring. Default: 30 s for "time", 120 s else.
      time_if_no_energy: where energy cannot be measured, choose by time instead of raising.
      frozen_weight: the weight is not trained, so that its gradient is not measured.
      use_cache: take a choice that was made under the same circumstances (device, driver, power limit, shapes, dtypes,
        options, versions), and keep this one.
      cache_dir: where. Default: the user's cache directory.
      **options: of `lm_head_loss` that are no arrays, such as `implementation` or `label_smoothing`.

    Raises:
      InputError: no candidate fits in the memory budget, none compiles, or there is no source of energy.
      KeyboardInterrupt: Ctrl-C or SIGTERM came while it was measuring; nothing is kept.
    """
    _check(objective, candidates, memory_budget_bytes, budget_s, options)
    shapes = Shapes(*(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (hidden, weight)))
    counts = tuple(sorted(set(candidates or candidate_counts(shapes.num_tokens))))
    implementation = _implementation(shapes, options)
    if implementation == "reference":
        counts = (1,)
    device = jax.devices()[0]
    watching = open_monitor(device)  # probes; reads nothing before it is started
    if objective != "time" and watching.energy_source is None:
        if not time_if_no_energy:
            raise InputError(
                f"objective {objective!r} needs energy, and there is no source of it here "
                f"({watching.energy_source_reason}); choose by time, or allow that with time_if_no_energy"
            )
        _logger.warning("warning: no energy here (%s): chunks are chosen by time", watching.energy_source_reason)
        objective = "time"
    budget_s = contest.BUDGETS_S[objective] if budget_s is None else budget_s
    circumstances = {
        "jaxchunk": jaxchunk.__version__,
        "jax": jax.__version__,
        "device": device.device_kind,
        "driver": _driver(watching),
        "hidden": _shape(shapes.hidden),
        "weight": _shape(shapes.weight),
        "implementation": implementation,
        "frozen_weight": frozen_weight,
        "options": {name: str(value) for name, value in sorted(options.items())},
        "objective": objective,
        "candidates": list(counts),
        "memory_budget_bytes": memory_budget_bytes,
        "budget_s": budget_s,
    }
    directory = None if cache_dir is None else Path(cache_dir)
    if use_cache and (known := choice_cache.read(circumstances, directory)) is not None:
        choice = ChunkChoice.from_dict(known, cached=True)
        _logger.info("lm_head_loss: %d chunks, measured before: %s", choice.num_chunks, choice.reason)
        return choice
    programs, dropped = _compile(shapes, counts, memory_budget_bytes, options, (0,) if frozen_weight else (0, 1))
    monitor: AnyMonitor = (
        Monitor(None, reason_if_none="only the time was asked for") if objective == "time" else watching
    )
    winner, reason, rows, measuring_s = _measure(programs, monitor, objective, budget_s)
    choice = ChunkChoice(winner, reason, objective, shapes.num_tokens, implementation, rows, dropped, measuring_s)
    _logger.info("lm_head_loss: %d chunks: %s", choice.num_chunks, choice.reason)
    if use_cache:
        choice_cache.write(circumstances, choice.as_dict(), directory)
    return choice


@dataclasses.dataclass(frozen=True)
class _Program:
    variant: Variant
    temporary_bytes: int


def _measure(
    programs: dict[int, _Program], monitor: AnyMonitor, objective: Objective, budget_s: float
) -> tuple[int, str, tuple[Candidate, ...], float]:
    """The count that is taken and why, what is known of all, and the seconds that it took."""
    memory = {n: program.temporary_bytes for n, program in programs.items()}
    if len(programs) == 1:
        (only,) = programs
        return only, "the only candidate", (Candidate(only, memory[only], 0, None, None, None),), 0.0
    _logger.info("measuring %s chunks for at most %.0f s ...", ", ".join(map(str, programs)), budget_s)
    rules, variants = Rules(), {n: program.variant for n, program in programs.items()}
    with StopRequest() as stop, monitor:
        held = contest.hold(
            variants, monitor, objective, budget_s=budget_s, rules=rules, say=_logger.info, check=stop.check
        )
    stop.check()
    if held is None:
        raise InputError(
            f"objective {objective!r}: the energy of no window is known "
            f"({monitor.energy_source_reason}); choose by time, or give a larger budget_s"
        )
    winner, reason = verdict(held.standing, memory, rules, MEANINGS[objective])
    rows = tuple(_candidate(n, memory[n], held.measurements, held.standing) for n in sorted(programs))
    return winner, reason, rows, held.seconds


def _candidate(num_chunks: int, temporary_bytes: int, measurements: Sequence[Measurement], end: Standing) -> Candidate:
    own = [m for m in measurements if m.variant == chunks_in_words(num_chunks)]
    time_s, energy_j = (interval_of(own, chunks_in_words(num_chunks), quantity) for quantity in ("time_s", "energy_j"))
    over = [math.expm1(min(value, 100.0)) for value in end.to_leader[num_chunks]]
    return Candidate(
        num_chunks,
        temporary_bytes,
        len(own),
        None if time_s is None else time_s.median,
        None if energy_j is None else energy_j.median,
        (over[0], over[1], over[2]) if all(map(math.isfinite, end.to_leader[num_chunks])) else None,
    )


def _compile(
    shapes: Shapes,
    counts: Sequence[int],
    budget_bytes: int | None,
    options: dict[str, Any],
    trained: tuple[int, ...],
) -> tuple[dict[int, _Program], dict[str, str]]:
    """Programs that compile and fit, and why others are dropped; operands are made once for all of them.

    `trained` are the places of the operands, hidden and weight, whose gradients are wanted.
    """
    limit_bytes = device_memory.limit_bytes(jax.devices()[0])
    hidden, weight, labels = _operands(shapes, options.get("weight_layout", "vd"))
    programs: dict[int, _Program] = {}
    dropped: dict[str, str] = {}
    too_large: dict[int, int] = {}
    for place, n in enumerate(counts, 1):
        _logger.info("compiling the loss with %d chunk(s), %d of %d ...", n, place, len(counts))
        jitted = jax.jit(jax.value_and_grad(functools.partial(_total_loss, n, options), trained))
        compile_program = functools.partial(_compiled, jitted, hidden, weight, labels)
        try:
            compiled = compile_if_it_fits(compile_program, limit_bytes)
        except Exception as error:  # whatever a compiler, or an option's check, has to say about one candidate
            compiled = first_line(error, with_type=True)[:300]
        if not isinstance(compiled, str):
            program, memory = compiled
            if budget_bytes is None or memory.temporary_bytes <= budget_bytes:
                call = functools.partial(program, hidden, weight, labels)
                programs[n] = _Program(Variant(chunks_in_words(n), call), memory.temporary_bytes)
                continue
            too_large[n] = memory.temporary_bytes
            compiled = f"its temporaries of {memory.temporary_bytes / 1e9:.3g} GB exceed the memory budget"
        dropped[str(n)] = compiled
        _logger.warning("%d chunk(s) are left out: %s", n, compiled)
    if not programs:
        _refuse(dropped, too_large, budget_bytes)
    return programs, dropped


def _compiled(jitted: jax.stages.Wrapped, *operands: Array) -> jax.stages.Compiled:
    return jitted.lower(*operands).compile()


def _refuse(dropped: dict[str, str], too_large: dict[int, int], budget_bytes: int | None) -> NoReturn:
    if too_large and budget_bytes is not None:
        least = min(too_large, key=too_large.__getitem__)
        raise InputError(
            f"no candidate fits in the memory budget of {budget_bytes / 1e9:.3g} GB; the smallest, {least} chunks, "
            f"needs {too_large[least] / 1e9:.3g} GB for temporaries: allow that, or give larger counts as candidates"
        )
    count, reason = next(iter(dropped.items()))
    raise InputError(f"no candidate can run; {count} chunk(s): {reason}")


def _total_loss(num_chunks: int, options: dict[str, Any], hidden: Array, weight: Array, labels: Array) -> Array:
    loss = lm_head_loss(hidden, weight, labels, num_chunks=num_chunks, **options)
    return jnp.sum(loss[0] if isinstance(loss, tuple) else loss)


def _operands(shapes: Shapes, layout: str) -> tuple[Array, Array, Array]:
    """Random, because zeros draw less power; labels likewise."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden, weight = shapes
    vocab = weight.shape[0 if layout == "vd" else 1]
    return (
        jax.random.normal(keys[0], hidden.shape, hidden.dtype),
        (0.02 * jax.random.normal(keys[1], weight.shape, weight.dtype)).astype(weight.dtype),
        jax.random.randint(keys[2], hidden.shape[:-1], 0, vocab),
    )


def _implementation(shapes: Shapes, options: dict[str, Any]) -> str:
    """The one that `lm_head_loss` will take, for the cache and the report."""
    hidden, weight = shapes
    vocab_dim = 0 if options.get("weight_layout", "vd") == "vd" else 1
    head = Head(hidden.shape[-1], weight.shape[vocab_dim], vocab_dim)
    dtype = options.get("compute_dtype") or hidden.dtype
    try:
        return choose_implementation(options.get("implementation"), compute_dtype=dtype, head=head).implementation
    except ValueError as error:
        raise InputError(str(error)) from None


def _check(
    objective: str,
    candidates: Sequence[int] | None,
    memory_budget_bytes: int | None,
    budget_s: float | None,
    options: dict[str, Any],
) -> None:
    if objective not in contest.BUDGETS_S:
        raise InputError(f"objective is {objective!r}; choose from {', '.join(contest.BUDGETS_S)}")
    if candidates is not None and (not candidates or min(candidates) < 1):
        raise InputError(f"candidates are {tuple(candidates)}; give chunk counts of at least 1")
    if memory_budget_bytes is not None and memory_budget_bytes < 0:
        raise InputError(f"memory_budget_bytes is {memory_budget_bytes}; it must not be negative")
    if budget_s is not None and not 0 < budget_s < math.inf:
        raise InputError(f"budget_s is {budget_s}; it must be greater than 0, and finite")
    arrays = [name for name, value in options.items() if isinstance(value, Array | jax.ShapeDtypeStruct)]
    if arrays:
        raise InputError(f"{', '.join(arrays)}: options that are arrays are not measured; leave them out")


def _driver(monitor: AnyMonitor) -> dict[str, Any]:
    """What of the machine a choice depends on; a power limit moves the balance of compute and memory."""
    known = {} if monitor.device is None else monitor.device.describe()
    return {
        "platform": jax.extend.backend.get_backend().platform_version,
        "driver_version": known.get("driver_version"),
        "power_limit_w": known.get("power_limit_w"),
    }


def _shape(operand: jax.ShapeDtypeStruct) -> str:
    return f"{operand.dtype}[{','.join(map(str, operand.shape))}]"


def _interval(over: tuple[float, float, float] | None) -> str:
    return "null" if over is None else f"{1 + over[0]:.4f} ({1 + over[1]:.4f} to {1 + over[2]:.4f})"
