"""A training run from its flags to its summary: what is prepared before the loop, and what is written after it."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax

import jaxchunk
from jaxchunk import environment, plotting
from jaxchunk.compilation import program_cache
from jaxchunk.errors import RunFailedError
from jaxchunk.run_dir import OtherProcessRun, RunDirectory, new_run_path
from jaxchunk.telemetry import AnyMonitor, open_monitor
from jaxchunk.training import banner, resume
from jaxchunk.training.checkpoint import Checkpoint, check_base
from jaxchunk.training.config import TrainConfig, validate
from jaxchunk.training.loop import TrainingLoop
from jaxchunk.training.mesh import Devices, choose_devices
from jaxchunk.training.plan import Plan, prepare
from jaxchunk.training.processes import Processes
from jaxchunk.training.resume import History
from jaxchunk.training.step import TrainState
from jaxchunk.training.writers import Writers, open_writers


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a training run from its config to its summary and figure, all of it in the run's directory.

    Args:
      config: the run; `default_config` gives the device's defaults.

    Returns:
      What `summary.json` holds; its "status" is "completed", "interrupted" (by Ctrl-C) or "stopped" (by SIGTERM).

    Raises:
      InputError: the config, the data, the directory or its checkpoints cannot be used.
      RunFailedError: the loss stayed NaN or infinite, or the last checkpoint could not be written; the summary of what
        was done is written.
    """
    processes = Processes.of_jax()
    with processes.together("flags"):
        validate(config)
        devices = choose_devices(config, jax.devices())
    processes.check_same("compared flags", _comparable(config))
    if (about := processes.first_does("checkpoint", lambda: resume.find(config))) is not None:
        config = resume.same_run(config, about, devices.shards)
    name = f"{config.model_name}-{config.lmhead_chunks}chunks"
    path = processes.first_does("out_dir", lambda: config.out_dir or str(new_run_path(name)))
    with processes.together("directory"):
        run: RunDirectory = OtherProcessRun(path)
        if processes.is_first:
            run = RunDirectory(path, overwrite=config.overwrite or config.resume, go_on=about is not None)
    with processes.together("preparation"):
        plan = prepare(config, devices, about)
    processes.check_same("compared preparation", {"the data": plan.dataset.sha256, "what was chosen": plan.choices()})
    restored = None if about is None else resume.restore(run.path, plan.programs.state, processes)
    with processes.together("first state"):
        state = _first_state(plan, restored)
    with contextlib.ExitStack() as stack:
        with processes.together("directory made"):
            stack.enter_context(run)
            after_the_summary = stack.enter_context(contextlib.ExitStack())  # writers may take long to end
            history = History() if restored is None else resume.take_up(run, restored, processes)
        with _watching(run, plan, history) as monitor:
            if processes.is_first:
                print(banner.describe_run(plan, monitor, run.path, history), flush=True)
                writers = after_the_summary.enter_context(_open_writers(run, plan, history))
            else:
                writers = Writers(lambda _: None)
            summary = TrainingLoop(plan, run, monitor, history, writers, processes).run(state)
            summary["peak_memory_bytes"] = _peak_memory_bytes(devices)
            summary["sampler_cpu_s"] = monitor.sampler_cpu_s
            summary["telemetry_errors"] = {name: dataclasses.asdict(error) for name, error in monitor.errors.items()}
        summary = processes.first_does("summary", lambda: summary)
        if processes.is_first:
            run.write_json("summary.json", summary)
            figure = plotting.plot_training(run.path)
    if processes.is_first:
        print(banner.describe_summary(summary, figure), flush=True)
        if history.step == config.steps:
            print(f"all of its {config.steps} steps were there already; --steps can make a run longer", flush=True)
    if summary["status"] == "failed":
        raise RunFailedError(summary["status_reason"])
    return summary


def _comparable(config: TrainConfig) -> dict[str, Any]:
    """What all processes must have in common before they begin: flags but for those of one host, and versions."""
    own = ("process_id", "coordinator", "cache_dir", "data", "tokenizer", "hf_model")  # files are compared by content
    flags = {f"--{name}": value for name, value in dataclasses.asdict(config).items() if name not in own}
    versions = {"JAX": jax.__version__, "jaxchunk": f"{jaxchunk.__version__} {environment.source_sha256()[:12]}"}
    return dict(json.loads(json.dumps(flags | versions)))


def _peak_memory_bytes(devices: Devices) -> int | None:
    """The most that a device of this process has used; None where it does not say (a CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices.local]
    return max((peak for peak in peaks if peak is not None), default=None)


def _first_state(plan: Plan, restored: Checkpoint | None) -> TrainState:
    """The state that training begins with; a restored one comes with its place in the data."""
    if restored is None:
        return plan.programs.init(*plan.model.start(plan.config.seed, plan.devices.place_param))
    plan.batches.set_state(restored.about["batches"])
    if plan.config.adapters is None:
        return restored.state
    first = plan.programs.init(*plan.model.start(plan.config.seed))
    check_base(plan.config, restored.about, first.frozen)
    return restored.state._replace(frozen=first.frozen)


@contextlib.contextmanager
def _watching(run: RunDirectory, plan: Plan, history: History) -> Iterator[AnyMonitor]:
    """A started monitor on the run's clock, which counts the time between two processes too; writes down the run."""
    number = run.beginnings
    readings = f"telemetry-readings-{number}.jsonl" if number else "telemetry-readings.jsonl"
    writes = not isinstance(run, OtherProcessRun)
    monitor = open_monitor(
        plan.devices.local,
        csv_path=run.path / "telemetry.csv" if writes else None,
        append_csv=number > 0,
        record_path=run.path / readings if writes and plan.config.record_telemetry else None,
    )
    about = environment.describe_environment(monitor.describe())
    about |= {"chosen": plan.choices(), "data": plan.describe_data(), "program_cache": program_cache()}
    elapsed_s = run.begin(dataclasses.asdict(plan.config), about, step=history.step)
    recorded_s = history.stretches[-1].end_s if history.stretches else 0.0
    monitor.start(elapsed_s=max(elapsed_s, recorded_s))  # the machine's clock may have been set back
    try:
        yield monitor
    finally:
        monitor.stop()


def _open_writers(run: RunDirectory, plan: Plan, history: History) -> contextlib.AbstractContextManager[Writers]:
    return open_writers(
        plan.config.log,
        run.path,
        config=dataclasses.asdict(plan.config),
        began_unix_s=run.began_unix_s,
        done_steps=history.step,
    )
