"""The LM head's chunk count where the flags leave it open: settled before training, or step by step during it."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxchunk.compilation import sum_of
from jaxchunk.data import IGNORE_INDEX
from jaxchunk.device_memory import usable
from jaxchunk.errors import InputError, first_line
from jaxchunk.models import qwen2
from jaxchunk.telemetry import AnyMonitor, open_monitor
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.memory import estimate_bytes, likely_micro_batch_sizes
from jaxchunk.training.programs import Programs
from jaxchunk.training.records import StepRecord
from jaxchunk.tuning import ChunkChoice, candidate_counts, choose_num_chunks
from jaxchunk.tuning.controller import Controller, StepSeen
from jaxchunk.tuning.policy import Rules

_ADAPTIVE_COUNTS = (1, 4, 16)  # each is compiled, and visited for minutes; costs change slowly with the count
_logger = logging.getLogger("jaxchunk")
TrainStep = Callable[..., Any]


def settle(
    config: TrainConfig, model: qwen2.Qwen2Config, limit_bytes: int | None
) -> tuple[TrainConfig, ChunkChoice | None]:
    """The config with a number of chunks, and how it was found.

    With `--lmhead_chunks auto` the head is measured alone, at the size of the micro-batch that the memory estimate
    takes for the largest that fits, before anything else is on the device. A config with `adaptive` stays as it is, for
    `compile_arms`.

    Args:
      config: the run.
      model: what is trained.
      limit_bytes: what the device's allocator will hand out; None for no limit.

    Raises:
      InputError: no candidate fits, or there is no energy to go by.
    """
    if isinstance(config.lmhead_chunks, int):
        return config, None
    _check(config)
    if config.lmhead_chunks == "adaptive":
        return config, None
    counts = config.chunk_candidates or candidate_counts(
        (config.micro_batch_size or config.batch_size) * config.seq_len
    )
    finest = dataclasses.replace(config, lmhead_chunks=max(counts))
    size = likely_micro_batch_sizes(finest, model, limit_bytes)[0]
    frozen = config.adapters is not None
    weight_dtype = config.compute_dtype if frozen else "float32"  # a frozen base is kept in the one it is used in
    choice = choose_num_chunks(
        jax.ShapeDtypeStruct((size, config.seq_len, model.hidden_size), jnp.dtype(config.compute_dtype)),
        jax.ShapeDtypeStruct((model.vocab_size, model.hidden_size), jnp.dtype(weight_dtype)),
        objective=config.chunk_objective,
        candidates=config.chunk_candidates or None,
        memory_budget_bytes=_memory_for_the_head(config, model, size, limit_bytes),
        budget_s=config.chunk_budget_s,
        time_if_no_energy=config.chunk_time_if_no_energy,
        frozen_weight=frozen,
        cache_dir=None if config.cache_dir is None else Path(config.cache_dir),
        implementation=config.lmhead_impl,
        ignore_index=IGNORE_INDEX,
    )
    return dataclasses.replace(config, lmhead_chunks=choice.num_chunks), choice


def _check(config: TrainConfig) -> None:
    if config.lmhead_chunks == "adaptive" and config.lmhead_impl == "reference":
        raise InputError("--lmhead_chunks adaptive: --lmhead_impl reference has no chunks")
    monitor = open_monitor(jax.devices()[0])  # probes, and reads nothing
    if config.chunk_objective == "time" or monitor.energy_source is not None:
        return
    if not config.chunk_time_if_no_energy:
        raise InputError(
            f"--chunk_objective {config.chunk_objective} needs energy, and there is no source of it here "
            f"({monitor.energy_source_reason}); choose time, or allow that with --chunk_time_if_no_energy"
        )
    if config.lmhead_chunks == "adaptive":  # `choose_num_chunks` says so itself
        _logger.warning("warning: no energy here (%s): chunks adapt to time", monitor.energy_source_reason)


def compile_arms(
    config: TrainConfig, compile_with: Callable[[TrainConfig], Programs]
) -> tuple[Programs, dict[int, TrainStep]]:
    """Programs of an adaptive run, and a training step for each candidate, all with the same micro-batches.

    The count with the most chunks comes first: it leaves the most room, and so settles the micro-batch. Candidates that
    do not fit then, or do not compile, are left out with a word.

    Args:
      config: the run.
      compile_with: compiles a config in which the count is a number.

    Raises:
      InputError: not even the first fits.
    """
    tokens = (config.micro_batch_size or config.batch_size) * config.seq_len
    defaults = [n for n in candidate_counts(tokens, powers_only=True) if n in _ADAPTIVE_COUNTS]
    first, *others = sorted(set(config.chunk_candidates or defaults), reverse=True)
    programs = compile_with(dataclasses.replace(config, lmhead_chunks=first))
    steps = {first: programs.train_step}
    size = programs.memory_plan.micro_batch_size
    for count in others:
        arm = dataclasses.replace(config, lmhead_chunks=count, micro_batch_size=size)
        _logger.info("compiling the step with %d chunk(s) ...", count)
        try:
            compiled = compile_with(arm)
        except Exception as error:  # whatever a compiler has to say about one candidate
            _logger.warning("%d chunk(s) are left out: %s", count, first_line(error)[:300])
            continue
        steps[count] = compiled.train_step
        times = {f"{count} chunk(s)": sum_of(list(compiled.compile_times.values()))}
        largest = max(programs.memory_plan, compiled.memory_plan, key=lambda plan: plan.memory.total_bytes)
        programs = programs._replace(compile_times=programs.compile_times | times, memory_plan=largest)
    return programs, dict(sorted(steps.items()))


class Chunks:
    """Which compiled step the trainer runs next: always the same."""

    def __init__(self, num_chunks: int, train_step: TrainStep):
        self._num_chunks, self._train_step = num_chunks, train_step

    def train_step(self, step: int) -> TrainStep:
        """The program for a step that is about to be dispatched."""
        return self._train_step

    @property
    def undecided(self) -> str | None:
        """What is to be said of a search that did not come to an end."""
        return None

    def count_of(self, step: int) -> int:
        """The number of chunks of a step that is on its way or done, and not observed yet."""
        return self._num_chunks

    def observe(self, record: StepRecord) -> None:
        """Takes in the record of a step, in order."""

    def end_stretch(self) -> None:
        """Steps pause here."""

    def about(self) -> dict[str, Any]:
        """What a checkpoint needs besides."""
        return {}


class AdaptiveChunks(Chunks):
    """The step that the policy asks for; every decision is a line of `chunks.jsonl`."""

    def __init__(self, steps: Mapping[int, TrainStep], controller: Controller):
        self._steps, self._controller = steps, controller
        self._counts: dict[int, int] = {}  # of steps on their way

    def train_step(self, step: int) -> TrainStep:
        """See `Chunks`."""
        self._counts[step] = self._controller.num_chunks
        return self._steps[self._counts[step]]

    @property
    def undecided(self) -> str | None:
        """See `Chunks`."""
        if not self._controller.in_first_epoch:
            return None
        return (
            f"chunks: the run ended before {', '.join(map(str, self._steps))} were compared to the end, which takes "
            f"{self._controller.first_epoch_s:.0f} s of training or more (--chunk_thermal_s sets it)"
        )

    def count_of(self, step: int) -> int:
        """See `Chunks`."""
        return self._counts[step]

    def observe(self, record: StepRecord) -> None:
        """See `Chunks`."""
        self._controller.observe(
            StepSeen(
                record.step,
                self._counts.pop(record.step),
                record.time_s - record.step_time_s,
                record.time_s,
                record.sm_clock_mhz,
                record.temperature_c,
                None if record.throttle is None else sum(record.throttle.values()) / record.num_devices,
            )
        )

    def end_stretch(self) -> None:
        """See `Chunks`."""
        self._controller.end_stretch()

    def about(self) -> dict[str, Any]:
        """See `Chunks`."""
        return {"chunk_controller": self._controller.to_json()}


def open_chunks(
    config: TrainConfig,
    steps: Mapping[int, TrainStep],
    monitor: AnyMonitor,
    about: Mapping[str, Any],
    record: Callable[[dict[str, Any]], None],
) -> Chunks:
    """What the trainer asks for its steps.

    Args:
      config: the run.
      steps: by chunk count.
      monitor: that the energy is asked from.
      about: of the checkpoint that is gone on from; empty at the beginning.
      record: takes a decision.
    """
    if config.lmhead_chunks != "adaptive":
        return Chunks(*next(iter(steps.items())))
    objective = config.chunk_objective if monitor.energy_source is not None else "time"  # `settle` has asked

    def energy_of(start_s: float, end_s: float) -> float | None:
        return monitor.window(monitor.start_s + start_s, monitor.start_s + end_s).energy_j

    rules = Rules(tuple(steps), thermal_constant_s=config.chunk_thermal_s)
    controller = Controller(rules, objective, energy_of=energy_of, record=record)
    if (saved := about.get("chunk_controller")) is not None and not controller.go_on_from(saved):
        _logger.warning("warning: chunk counts or the policy are others than in the checkpoint: it begins anew")
    return AdaptiveChunks(steps, controller)


def compare_sizes(choice: ChunkChoice | None, micro_batch_size: int, seq_len: int) -> None:
    """Says where the compiled step has other micro-batches than the estimate, at whose size chunks were measured."""
    if choice is not None and choice.num_tokens != micro_batch_size * seq_len:
        _logger.warning(
            "warning: %d chunks were chosen for micro-batches of %d tokens, and those that fit have %d; give "
            "--micro_batch_size to have them measured at that size",
            *(choice.num_chunks, choice.num_tokens, micro_batch_size * seq_len),
        )


def _memory_for_the_head(
    config: TrainConfig, model: qwen2.Qwen2Config, micro_batch_size: int, limit_bytes: int | None
) -> int | None:
    if config.chunk_memory_gb is not None:
        return int(config.chunk_memory_gb * 1e9)
    if limit_bytes is None:
        return None
    without_logits = dataclasses.replace(config, lmhead_chunks=config.tokens_per_step)
    return max(int(usable(limit_bytes)) - estimate_bytes(without_logits, model, micro_batch_size), 0)
