"""The training loop: dispatch a step, then read the one before it; telemetry watches from the side."""

import contextlib
import dataclasses
import math
import signal
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax

import jaxchunk
from jaxchunk import data
from jaxchunk.errors import RunFailedError
from jaxchunk.models import hf, lora, qwen2
from jaxchunk.run_dir import RunDirectory
from jaxchunk.stop import StopRequest
from jaxchunk.telemetry import AnyMonitor, CompletionWatcher
from jaxchunk.training.checkpoint import Checkpoints
from jaxchunk.training.chunks import open_chunks
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.energy_sum import add_up
from jaxchunk.training.flops import peak_flops, training_flops_per_token
from jaxchunk.training.plan import Plan
from jaxchunk.training.processes import Processes
from jaxchunk.training.progress import Progress
from jaxchunk.training.records import WARMUP_STEPS, Stretch, perplexity, step_record, stretch_record, summarize
from jaxchunk.training.resume import History
from jaxchunk.training.samples import Sampler
from jaxchunk.training.step import StepMetrics, TrainState, whole_params
from jaxchunk.training.trace import StepTrace, parse_steps
from jaxchunk.training.writers import Writers

_TELLING_TIMEOUT_S = 5.0  # how long to wait for what other processes have measured, at the end of a stretch
_TICK_TIMEOUT_S = 1.0  # how long to wait for the energy counter's next tick before and after a stretch


class _BadStepsError(Exception):
    """The loss or the gradient stayed NaN or infinite; the message says at which step."""


@dataclasses.dataclass
class _Completed:
    """A step that is done on the device; its energy is known a tick or two later."""

    step: int
    start_s: float
    end_s: float
    metrics: dict[str, float]


class TrainingLoop:
    """The state of the loop. Steps run in stretches between validations and checkpoints; energy is known for each."""

    def __init__(
        self,
        plan: Plan,
        run: RunDirectory,
        monitor: AnyMonitor,
        history: History,
        writers: Writers,
        processes: Processes,
    ):
        """Takes up where `history` ends.

        Args:
          plan: what runs.
          run: where records go.
          monitor: started.
          history: of a run that goes on.
          writers: of others, such as TensorBoard's.
          processes: all that take part.
        """
        self._plan, self._config, self._programs, self._run = plan, plan.config, plan.programs, run
        self._monitor, self._writers, self._processes = monitor, writers, processes
        self._agreed_signal = 0  # to stop, which all processes know of
        self._history = history
        about = {} if history.checkpoint is None else history.checkpoint.about
        self._chunks = open_chunks(plan.config, plan.train_steps, monitor, about, self._record_chunks)
        self._records = list(history.records)
        self._stretches: list[Stretch] = list(history.stretches)
        self._done = history.step  # the last step that is complete
        self._bad_steps = 0  # in a row; no checkpoint is saved after one
        self._completed: deque[_Completed] = deque()
        self._steady_from_s = math.inf  # when clocks and power had settled
        self._validated = history.last_validation  # step and loss
        self._flops_per_token = training_flops_per_token(
            plan.model.config, plan.config.seq_len, frozen=plan.config.adapters is not None
        )
        self._peak_flops = peak_flops(plan.devices.used, plan.config.compute_dtype)

    def run(self, state: TrainState) -> dict[str, Any]:
        """Trains `state` to the end, a stop or bad steps; returns the summary of what was done."""
        with (
            Progress(self._config.steps, self._done, silent=not self._processes.is_first) as self._progress,
            contextlib.closing(CompletionWatcher(self._monitor.now)) as self._watcher,
            self._open_checkpoints() as self._checkpoints,
            self._open_trace() as self._trace,
            StopRequest() as self._stop,
        ):
            try:
                status, reason = self._train(state)
            except KeyboardInterrupt:
                status, reason = "interrupted", f"interrupted after {self._done} steps; {self._how_to_go_on()}"
            except _BadStepsError as error:
                status, reason = "failed", f"{error}; {self._how_to_go_on()}"
            if status in ("interrupted", "stopped"):
                self._progress.say(f"{reason}; what was measured is kept")
            saving = {} if self._checkpoints is None else {"checkpoint_blocked_s": self._checkpoints.blocked_s}
        summary = summarize(self._records, self._stretches, self._config.tokens_per_step)
        times = {name: time._asdict() for name, time in self._programs.compile_times.items()}
        compiling = {"compile_time_s": self._programs.compile_time_s, "compile_times": times}
        outcome = {"status": status, "status_reason": reason, **compiling}
        step, val_loss = self._validated
        validation = {"val_loss": val_loss, "val_perplexity": perplexity(val_loss)} if step else {}
        return outcome | summary | validation | saving

    def _train(self, state: TrainState) -> tuple[str, str | None]:
        """All steps that are left, or those before a stop; returns how it ended."""
        config = self._config
        jax.block_until_ready(state)
        self._base = None if state.frozen is None else lora.fingerprint(state.frozen)
        self._monitor.wait_ready(self._monitor.now(), _TICK_TIMEOUT_S)  # nothing is known before the first tick
        for first, last in _stretches(self._done, config):
            state = self._train_stretch(state, first, last)
            params, ended = whole_params(config, state.params, state.frozen), self._done == config.steps
            if ended or (self._done == last and _due(config.val_every, last)):
                self._validate(params)
            if self._plan.sampler and (ended or (self._done == last and _due(config.sample_every, last))):
                self._sample(self._plan.sampler, params)
            stopped_by = None if self._done == config.steps else self._stopped_by
            if stopped_by or self._done == config.steps or _due(config.checkpoint_every, self._done):
                self._save(state)
            if stopped_by:
                status = "interrupted" if stopped_by == "SIGINT" else "stopped"
                return self._saved_to_the_end(status, f"{status} by {stopped_by} after {self._done} steps")
        if undecided := self._chunks.undecided:
            self._progress.say(undecided)
        return self._saved_to_the_end("completed", None)

    def _train_stretch(self, state: TrainState, first: int, last: int) -> TrainState:
        """Runs steps `first` to `last`; the device always has the next step before the last one's metrics are read."""
        start_s = self._monitor.now()
        self._monitor.attend()
        in_flight: deque[tuple[int, StepMetrics]] = deque()
        previous_end_s = start_s
        try:
            for step in range(first, last + 1):
                if self._stopped_by is not None:
                    break
                self._trace.before(step, state)
                train_step = self._chunks.train_step(step)
                state, metrics = train_step(state, next(self._plan.batches), *self._own_signal())
                self._watcher.watch(step, metrics)
                in_flight.append((step, metrics))
                if len(in_flight) > 1:
                    previous_end_s = self._complete(*in_flight.popleft(), previous_end_s)
                    self._write_records(wait=False)
            while in_flight:
                previous_end_s = self._complete(*in_flight.popleft(), previous_end_s)
        finally:  # an interrupt or bad steps end the stretch early; what was done still counts
            if previous_end_s > start_s:
                self._monitor.attend()
                self._write_records(wait=True)
                self._write_stretch(first, start_s, previous_end_s)
        return state

    @property
    def _stopped_by(self) -> str | None:
        """The name of the signal to stop at; of several processes, one that all of them know of since the same step."""
        if self._processes.count == 1:
            return self._stop.signal_name
        return signal.Signals(self._agreed_signal).name if self._agreed_signal else None

    def _own_signal(self) -> tuple[int, ...]:
        if self._processes.count == 1:
            return ()
        return (0 if self._stop.signal_name is None else int(signal.Signals[self._stop.signal_name]),)

    def _complete(self, step: int, metrics: StepMetrics, start_s: float) -> float:
        end_s = self._watcher.wait(step)
        read = jax.device_get(metrics)
        self._agreed_signal = self._agreed_signal or int(read.stop or 0)
        values = {name: float(value) for name, value in read._asdict().items() if name != "stop"}
        self._completed.append(_Completed(step, start_s, end_s, values))
        self._done = step
        self._trace.after(step)
        if step == self._history.step + WARMUP_STEPS:
            self._steady_from_s = end_s
        if self._checkpoints is not None:
            self._checkpoints.poll()
        self._check_finite(step, values)
        return end_s

    def _check_finite(self, step: int, values: dict[str, float]) -> None:
        names = {"loss": "loss", "grad_norm": "gradient's norm"}
        bad = next(
            (f"the {names[key]} is {values[key]} at step {step}" for key in names if not math.isfinite(values[key])),
            None,
        )
        if bad is None:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        if self._bad_steps == self._config.max_bad_steps:
            raise _BadStepsError(f"{bad}, bad step {self._bad_steps} in a row")
        self._progress.say(f"{bad}: it changes no parameter")

    def _write_records(self, *, wait: bool) -> None:
        """Writes the records of completed steps whose energy is settled; with `wait`, of all of them."""
        if wait and self._completed:  # once for all of them: a counter that stands still must not cost this every time
            self._monitor.wait_ready(self._completed[-1].end_s, _TICK_TIMEOUT_S)
        while self._completed and (wait or self._monitor.ready(self._completed[0].end_s)):
            done = self._completed[0]
            window = self._monitor.window(done.start_s, done.end_s)
            total = add_up(self._processes, f"step {done.step}", window, timeout_s=_TELLING_TIMEOUT_S if wait else None)
            if total is None:
                break
            if not self._processes.is_first:
                self._completed.popleft()
                continue
            record = step_record(
                done.step,
                done.metrics,
                total,
                clock_zero_s=self._monitor.start_s,
                tokens=self._config.tokens_per_step,
                flops_per_token=self._flops_per_token,
                peak_flops=self._peak_flops,
                lmhead_chunks=self._chunks.count_of(done.step),
            )
            self._completed.popleft()
            self._records.append(record)
            self._append("steps.jsonl", record.as_dict())
            self._writers.write(record.as_dict())
            self._progress.step(record)
            self._chunks.observe(record)

    def _write_stretch(self, first: int, start_s: float, end_s: float) -> None:
        monitor = self._monitor
        self._chunks.end_stretch()
        samples = monitor.samples(max(start_s, self._steady_from_s), end_s)
        window = monitor.window(start_s, end_s)
        window = add_up(self._processes, f"stretch {first}", window, timeout_s=_TELLING_TIMEOUT_S) or window
        stretch = stretch_record(first, self._done, window, samples, clock_zero_s=monitor.start_s)
        self._stretches.append(stretch)
        self._append("stretches.jsonl", dataclasses.asdict(stretch))
        monitor.forget_before(end_s)

    def _validate(self, params: qwen2.Params) -> None:
        step, batch_size = self._done, self._programs.memory_plan.micro_batch_size
        rows = self._plan.devices.rows(batch_size)
        batches = data.validation_batches(self._plan.split.validation, batch_size, self._config.val_batches, rows)
        sums = [self._programs.eval_step(params, batch) for batch in batches]
        loss, tokens = (float(sum(part)) for part in zip(*jax.device_get(sums), strict=True))
        self._validated = step, loss / tokens
        losses = {"val_loss": loss / tokens, "val_perplexity": perplexity(loss / tokens)}
        record = {"step": step, "time_s": self._monitor.now() - self._monitor.start_s, **losses}
        self._append("validation.jsonl", record | {"tokens": int(tokens)})
        self._writers.write({"step": step, **losses})
        self._progress.say(
            f"step {step}: validation loss {loss / tokens:.4f}, perplexity {losses['val_perplexity']:.2f} over "
            f"{int(tokens):,} held-out tokens"
        )

    def _sample(self, sampler: Sampler, params: qwen2.Params) -> None:
        samples = sampler.sample(params)
        time_s = self._monitor.now() - self._monitor.start_s
        for sample in samples:
            self._append("samples.jsonl", {"step": self._done, "time_s": time_s, **sample})
        shown = samples[0]
        self._progress.say(f"step {self._done}: after {shown['prompt'][-60:]!r} it writes {shown['completion']!r}")

    def _record_chunks(self, decision: dict[str, Any]) -> None:
        self._append("chunks.jsonl", decision)
        self._progress.say(f"step {decision['step']}, chunks: {decision['reason']}")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        try:
            self._run.append(name, record)
        except RunFailedError:
            if self._checkpoints is None:
                raise
            self._checkpoints.wait()  # it may be what fills the disk, until it fails and is cleared away
            self._run.append(name, record)

    def _open_checkpoints(self) -> contextlib.AbstractContextManager[Checkpoints | None]:
        keep = self._config.keep_checkpoints
        if not keep:
            return contextlib.nullcontext()
        return Checkpoints(self._run.path, keep=keep, say=self._progress.say, processes=self._processes)

    def _open_trace(self) -> StepTrace:
        wanted = self._config.profile_steps if self._processes.is_first else None
        steps = None if wanted is None else parse_steps(wanted)
        return StepTrace(steps, self._run.path / "profile", self._progress.say, self._programs.train_step_text)

    def _save(self, state: TrainState) -> None:
        """Begins to save the state after the last step, unless it is in doubt."""
        if self._checkpoints is None:
            return
        if self._bad_steps:
            self._progress.say(f"no checkpoint at step {self._done}: its loss or gradient is not finite")
            return
        step, val_loss = self._validated
        known = step == self._done and math.isfinite(val_loss)
        about = {
            "step": self._done,
            "jaxchunk": jaxchunk.__version__,
            "config": dataclasses.asdict(self._config),
            "model": hf.to_hf_config(self._plan.model.config, "float32"),
            "mesh": self._plan.devices.shards._asdict(),
            "micro_batch_size": self._programs.memory_plan.micro_batch_size,
            "data": {"tokens_sha256": self._plan.dataset.sha256, "description": self._plan.dataset.description},
            "batches": self._plan.batches.get_state(),
            "base_fingerprint": self._base,
            **self._chunks.about(),
        }
        self._checkpoints.save(self._done, state, about, val_loss if known else None)

    def _saved_to_the_end(self, status: str, reason: str | None) -> tuple[str, str | None]:
        """How the run ended, once its last checkpoint is written; failed, where that could not be written."""
        if self._checkpoints is not None:
            self._checkpoints.wait()
            if self._checkpoints.newest != (self._done or None):
                return "failed", f"there is no checkpoint of step {self._done}, the last; {self._how_to_go_on()}"
        return status, reason if status == "completed" else f"{reason}; {self._how_to_go_on()}"

    def _how_to_go_on(self) -> str:
        if self._checkpoints is not None:
            self._checkpoints.wait()
        if self._checkpoints is None or self._checkpoints.newest is None:
            return "there is no checkpoint to go on from"
        return (
            f"go on from the checkpoint of step {self._checkpoints.newest} with the same flags and "
            f"--resume --out_dir {self._run.path}"
        )


def _stretches(done: int, config: TrainConfig) -> Iterator[tuple[int, int]]:
    """First and last step (from 1) of each stretch between validations and checkpoints, after `done` steps."""
    while done < config.steps:
        last = next(
            s
            for s in range(done + 1, config.steps + 1)
            if s == config.steps
            or any(_due(every, s) for every in (config.val_every, config.checkpoint_every, config.sample_every))
        )
        yield done + 1, last
        done = last


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
