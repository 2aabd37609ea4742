"""The training loop: dispatch a step, then read the one before it; telemetry watches from the side."""

import contextlib
import dataclasses
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxchunk import data, environment, plotting
from jaxchunk.errors import RunFailedError
from jaxchunk.models import qwen2
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.telemetry import AnyMonitor, CompletionWatcher, Samples, Window, open_monitor
from jaxchunk.training import banner
from jaxchunk.training.config import TrainConfig, validate
from jaxchunk.training.flops import peak_flops, training_flops_per_token
from jaxchunk.training.plan import Plan, prepare
from jaxchunk.training.progress import Progress
from jaxchunk.training.records import WARMUP_STEPS, StepRecord, step_record, summarize
from jaxchunk.training.step import StepMetrics

_TICK_TIMEOUT_S = 1.0  # how long to wait for the energy counter's next tick before and after a stretch


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a training run from its config to its summary and figure, all of it in the run's directory.

    Args:
      config: the run; `default_config` gives the device's defaults.

    Returns:
      What `summary.json` holds; its "status" is "completed" or "interrupted".

    Raises:
      InputError: the config, the data or the directory cannot be used.
      RunFailedError: the loss became NaN or infinite; the summary of what was done is written.
    """
    validate(config)
    device = jax.devices()[0]
    run = RunDirectory(
        config.out_dir or new_run_path(f"{config.model_name}-{config.lmhead_chunks}chunks"), overwrite=config.overwrite
    )
    plan = prepare(config, device)
    start = plan.model.start(config.seed)
    record_path = run.path / "telemetry-readings.jsonl" if config.record_telemetry else None
    with run, open_monitor(device, csv_path=run.path / "telemetry.csv", record_path=record_path) as monitor:
        run.write_json("config.json", dataclasses.asdict(config))
        about = environment.describe_environment(monitor.describe())
        run.write_json("env.json", about | {"chosen": plan.choices(), "data": plan.describe_data()})
        print(banner.describe_run(plan, monitor, run.path), flush=True)
        summary = _Training(plan, run, monitor, start).run()
        summary["peak_memory_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
        summary["sampler_cpu_s"] = monitor.sampler_cpu_s
        summary["telemetry_errors"] = {name: dataclasses.asdict(error) for name, error in monitor.errors.items()}
        run.write_json("summary.json", summary)
        figure = plotting.plot_training(run.path)
    print(banner.describe_summary(summary, figure), flush=True)
    if summary["status"] == "failed":
        raise RunFailedError(summary["status_reason"])
    return summary


class _NonFiniteLossError(Exception):
    """The loss became NaN or infinite; the message says at which step."""


@dataclasses.dataclass
class _Completed:
    """A step that is done on the device; its energy is known a tick or two later."""

    step: int
    start_s: float
    end_s: float
    metrics: dict[str, float]


class _Training:
    """The state of the loop. Steps run in stretches between validations; energy is known for each."""

    def __init__(self, plan: Plan, run: RunDirectory, monitor: AnyMonitor, start: PRNGKeyArray | qwen2.Params):
        self._config, self._programs, self._split, self._run = plan.config, plan.programs, plan.split, run
        self._batches, self._monitor, self._start = plan.batches, monitor, start
        self._records: list[StepRecord] = []
        self._completed: deque[_Completed] = deque()
        self._stretches: list[Window] = []
        self._samples: list[Samples] = []
        self._steady_from_s = math.inf  # when clocks and power had settled
        self._validation: dict[str, float] = {}
        self._flops_per_token = training_flops_per_token(plan.model.config, plan.config.seq_len)
        self._peak_flops = peak_flops(jax.devices()[0], plan.config.compute_dtype)

    def run(self) -> dict[str, Any]:
        """Trains to the end, an interrupt or a bad loss; returns the summary of what was done."""
        config, status, reason = self._config, "completed", None
        with (
            Progress(config.steps) as self._progress,
            contextlib.closing(CompletionWatcher(self._monitor.now)) as self._watcher,
        ):
            try:
                state = self._programs.init(self._start)
                jax.block_until_ready(state)
                self._monitor.wait_ready(self._monitor.now(), _TICK_TIMEOUT_S)  # nothing is known before the first tick
                for first, last in _stretches(config.steps, config.val_every):
                    state = self._train_stretch(state, first, last)
                    self._validate(state.params, last)
            except KeyboardInterrupt:
                status, reason = "interrupted", f"interrupted after {len(self._records)} steps"
                self._progress.say(f"{reason}; what was measured is kept")
            except _NonFiniteLossError as error:
                status, reason = "failed", str(error)
        summary = summarize(self._records, self._stretches, self._samples, config.tokens_per_step)
        outcome = {"status": status, "status_reason": reason, "compile_time_s": self._programs.compile_time_s}
        return outcome | summary | self._validation

    def _train_stretch(self, state: Any, first: int, last: int) -> Any:
        """Runs steps `first` to `last`; the device always has the next step before the last one's metrics are read."""
        start_s = self._monitor.now()
        self._monitor.attend()
        in_flight: deque[tuple[int, StepMetrics]] = deque()
        previous_end_s = start_s
        try:
            for step in range(first, last + 1):
                state, metrics = self._programs.train_step(state, next(self._batches))
                self._watcher.watch(step, metrics)
                in_flight.append((step, metrics))
                if len(in_flight) > 1:
                    previous_end_s = self._complete(*in_flight.popleft(), previous_end_s)
                    self._write_records(wait=False)
            while in_flight:
                previous_end_s = self._complete(*in_flight.popleft(), previous_end_s)
        finally:  # an interrupt or a bad loss ends the stretch early; what was done still counts
            if previous_end_s > start_s:
                self._monitor.attend()
                self._write_records(wait=True)
                self._stretches.append(self._monitor.window(start_s, previous_end_s))
                self._samples.append(self._monitor.samples(max(start_s, self._steady_from_s), previous_end_s))
                self._monitor.forget_before(previous_end_s)
        return state

    def _complete(self, step: int, metrics: StepMetrics, start_s: float) -> float:
        end_s = self._watcher.wait(step)
        values = {name: float(value) for name, value in jax.device_get(metrics)._asdict().items()}
        self._completed.append(_Completed(step, start_s, end_s, values))
        if step == WARMUP_STEPS:
            self._steady_from_s = end_s
        if not np.isfinite(values["loss"]):
            raise _NonFiniteLossError(f"the loss is {values['loss']} at step {step}; the records up to it are kept")
        return end_s

    def _write_records(self, *, wait: bool) -> None:
        """Writes the records of completed steps whose energy is settled; with `wait`, of all of them."""
        if wait and self._completed:  # once for all of them: a counter that stands still must not cost this every time
            self._monitor.wait_ready(self._completed[-1].end_s, _TICK_TIMEOUT_S)
        while self._completed and (wait or self._monitor.ready(self._completed[0].end_s)):
            done = self._completed[0]
            record = step_record(
                done.step,
                done.metrics,
                self._monitor.window(done.start_s, done.end_s),
                clock_zero_s=self._monitor.start_s,
                tokens=self._config.tokens_per_step,
                flops_per_token=self._flops_per_token,
                peak_flops=self._peak_flops,
            )
            self._completed.popleft()
            self._records.append(record)
            self._run.append("steps.jsonl", record.as_dict())
            self._progress.step(record)

    def _validate(self, params: qwen2.Params, step: int) -> None:
        batch_size = self._programs.memory_plan.micro_batch_size
        batches = data.validation_batches(self._split.validation, batch_size, self._config.val_batches)
        sums = [self._programs.eval_step(params, batch) for batch in batches]
        loss, tokens = (float(sum(part)) for part in zip(*jax.device_get(sums), strict=True))
        self._validation = {"val_loss": loss / tokens}
        record = {"step": step, "time_s": self._monitor.now() - self._monitor.start_s, "val_loss": loss / tokens}
        self._run.append("validation.jsonl", record | {"tokens": int(tokens)})
        self._progress.say(f"step {step}: validation loss {loss / tokens:.4f} over {int(tokens):,} held-out tokens")


def _stretches(steps: int, val_every: int) -> Iterator[tuple[int, int]]:
    """First and last step (from 1) of each stretch between validations."""
    length = val_every or steps
    for first in range(1, steps + 1, length):
        yield first, min(first + length - 1, steps)
