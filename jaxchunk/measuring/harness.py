"""What every benchmark has in common: its directory, preflight, records, progress, interruption, continuation."""

import contextlib
import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro
from tqdm import tqdm

from jaxchunk import environment
from jaxchunk.device_memory import is_out_of_memory
from jaxchunk.errors import InputError, first_line
from jaxchunk.measuring import preflight
from jaxchunk.measuring.protocol import Conditions, Measurement, Protocol, Variant, measure, settle
from jaxchunk.run_dir import RunDirectory, new_run_path, read_json_lines
from jaxchunk.stop import StopRequest
from jaxchunk.telemetry import AnyMonitor, open_monitor

_logger = logging.getLogger("jaxchunk")
RECORDS = "records.jsonl"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """Where a run writes to."""

    out_dir: str | None = None
    """Where records, table and figures go. Default: a new directory under runs/."""
    overwrite: bool = False
    """Replace a run that out_dir holds."""
    go_on: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """Go on with the interrupted run that out_dir holds: what was measured is kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig(OutputConfig):
    """What every benchmark can be told."""

    repeats: int = 5
    """Times that every variant is measured, in an order shuffled anew each time."""
    settle_s: float = 20.0
    """Longest time, in seconds, to bring the GPU to the common temperature before a window. 0: do not look at it."""
    seed: int = 0
    """Seed of the operands and of the order."""
    record_telemetry: bool = False
    """Keep every reading of the telemetry in telemetry-readings-*.jsonl, for `telemetry.Monitor.replay`."""


def protocol_of(config: BenchConfig, **details: Any) -> Protocol:
    """The protocol that the common flags ask for; `details` are fields of it that they do not settle."""
    return Protocol(
        repeats=config.repeats,
        temperature_tolerance_c=2.0 if config.settle_s else None,
        settle_s=config.settle_s,
        seed=config.seed,
        **details,
    )


# Flags that may differ between a run and its continuation.
_FREE = ("out_dir", "overwrite", "go_on", "repeats", "wall_meter", "timeline", "record_telemetry")


def check_common(config: BenchConfig) -> None:
    """Refuses what no benchmark can do.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    if config.repeats < 1:
        raise InputError(f"--repeats is {config.repeats}; it must be at least 1")
    if not 0 <= config.settle_s < math.inf:
        raise InputError(f"--settle_s is {config.settle_s}; it must be at least 0, and finite")
    check_seed(config.seed)
    check_output(config)


def check_seed(seed: int) -> None:
    """Refuses seeds that JAX does not take.

    Raises:
      InputError: it is out of range.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed is {seed}; it must be from 0 to {2**32 - 1}")


def check_output(config: OutputConfig) -> None:
    """Refuses flags that contradict each other.

    Raises:
      InputError: naming them.
    """
    if config.go_on and config.out_dir is None:
        raise InputError("--continue needs --out_dir: the directory of the run to go on with")
    if config.go_on and config.overwrite:
        raise InputError("--continue and --overwrite exclude each other: one keeps the run in out_dir, one replaces it")


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A benchmark as the harness sees it.

    Attributes:
      name: for the directory.
      config: the flags.
      protocol: how it measures.
      variants: makes (compiles) the variants; called once the directory is known to be usable.
      report: writes summary, table and figures from the measurements, and returns what to print.
      num_devices: devices that are watched.
      num_processes: of ours that may be on the device at a time.
    """

    name: str
    config: BenchConfig
    protocol: Protocol
    variants: Callable[[], Sequence[Variant]]
    report: Callable[[RunDirectory, Sequence[Measurement]], str]
    num_devices: int = 1
    num_processes: int = 1


def run(benchmark: Benchmark) -> RunDirectory:
    """Measures, and writes records as they come and the report at the end, also of a run that is interrupted.

    Returns:
      The run's directory.

    Raises:
      InputError: the directory cannot be used, the run in it is another one, or the device's memory is too small.
      KeyboardInterrupt: after a run that Ctrl-C or SIGTERM ended was reported on; the first lets a running window's
        calls, or a peer's process that is being started, come to their end.
    """
    config = benchmark.config
    path = config.out_dir or new_run_path(benchmark.name)
    directory = RunDirectory(path, overwrite=config.overwrite, go_on=config.go_on)
    if directory.goes_on:
        _check_same(directory, benchmark)
    elif config.go_on:
        print(f"{path} holds no run to go on with: a new one begins", flush=True)
    with memory_errors():
        variants = benchmark.variants()
    with directory:
        with memory_errors(), StopRequest() as stop, _watching(directory, benchmark) as monitor:
            interrupted = _measure_all(benchmark, variants, monitor, directory, stop)
        measurements = read_measurements(directory.path)
        _warn_of_temperatures(directory, benchmark.protocol, measurements)
        if measurements:
            print(benchmark.report(directory, measurements))
        print(f"records: {directory.path}")
    if interrupted:
        total = len(variants) * benchmark.protocol.repeats
        print(
            f"interrupted: {len(measurements)} of {total} windows are measured and kept; go on with the same flags and "
            f"--continue --out_dir {directory.path}"
        )
        raise KeyboardInterrupt
    stop.check()  # it came when the last window had begun
    return directory


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """One line where the device refuses memory, of which another program may hold some."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise InputError(
            f"the device has too little memory for this shape ({first_line(error)}); use a smaller one"
        ) from None


def read_measurements(path: Path) -> list[Measurement]:
    """The measurements of a run, up to the last whole record."""
    known = {field.name for field in dataclasses.fields(Measurement)}
    records = read_json_lines(path / RECORDS)
    return [Measurement(**{key: value for key, value in record.items() if key in known}) for record in records]


def is_complete(path: Path, repeats: int) -> bool:
    """Whether the run in a directory has all of its windows."""
    conditions = RunDirectory(path, go_on=True).read_json("conditions.json") if path.is_dir() else None
    return conditions is not None and len(read_measurements(path)) >= len(conditions["calls"]) * repeats


@contextlib.contextmanager
def _watching(directory: RunDirectory, benchmark: Benchmark) -> Iterator[AnyMonitor]:
    """A started monitor, with its times counted from the run's beginning, and everything about the run written down."""
    number = directory.beginnings  # 0 also where a run got no further than its directory
    devices = jax.devices()[: benchmark.num_devices]
    record_path = directory.path / f"telemetry-readings-{number}.jsonl" if benchmark.config.record_telemetry else None
    monitor = open_monitor(
        devices if len(devices) > 1 else devices[0],
        csv_path=directory.path / "telemetry.csv",
        append_csv=number > 0,
        record_path=record_path,
    )
    about = environment.describe_environment(monitor.describe())
    if number:
        _warn_of_changes(directory, about)
    monitor.start(elapsed_s=directory.begin(dataclasses.asdict(benchmark.config), about, benchmark=benchmark.name))
    try:
        yield monitor
    finally:
        monitor.stop()


def _measure_all(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    monitor: AnyMonitor,
    directory: RunDirectory,
    stop: StopRequest,
) -> bool:
    """Measures what is missing; True where it was interrupted."""
    done = read_measurements(directory.path)
    total = len(variants) * benchmark.protocol.repeats
    try:
        conditions = _conditions(benchmark, variants, monitor, directory, stop)
        for warning in (
            *preflight.other_processes(monitor, benchmark.num_processes),
            *preflight.stuck_clocks(monitor, conditions),
        ):
            _warn(directory, warning)
        piece = len(directory.read_json("run.json")["continued"])
        measuring = measure(variants, monitor, benchmark.protocol, conditions, done=done, piece=piece, check=stop.check)
        for measurement in _with_progress(measuring, total, len(done), len(variants)):
            directory.append(RECORDS, dataclasses.asdict(measurement))
            monitor.forget_before(monitor.now() - 5.0)
    except KeyboardInterrupt:
        return True
    return False


def _with_progress(measuring: Iterator[Measurement], total: int, done: int, every: int) -> Iterator[Measurement]:
    """A bar with the remaining time on a terminal; elsewhere a line after every `every` windows."""
    if sys.stderr.isatty():
        yield from tqdm(measuring, total=total, initial=done, unit="window")
        return
    start_s = time.monotonic()
    for count, measurement in enumerate(measuring, 1):
        yield measurement
        if count % every == 0:
            left_s = (time.monotonic() - start_s) / count * (total - done - count)
            print(f"{done + count} of {total} windows; about {left_s / 60:.1f} minutes left", flush=True)


def _conditions(
    benchmark: Benchmark,
    variants: Sequence[Variant],
    monitor: AnyMonitor,
    directory: RunDirectory,
    stop: StopRequest,
) -> Conditions:
    """As settled by the run that is continued, where there is one."""
    known = directory.read_json("conditions.json")
    if known is not None and set(known["calls"]) >= {variant.name for variant in variants}:
        return Conditions(**known)
    if known is not None:
        _warn(directory, "other variants fit in memory than before: the conditions of the windows are settled anew")
    conditions = settle(variants, monitor, benchmark.protocol, check=stop.check)
    directory.write_json("conditions.json", dataclasses.asdict(conditions))
    return conditions


def _check_same(directory: RunDirectory, benchmark: Benchmark) -> None:
    name = (directory.read_json("run.json") or {}).get("benchmark")
    if name not in (None, benchmark.name):
        raise InputError(f"--continue: the run in {directory.path} is of the benchmark {name}, not of {benchmark.name}")
    flags = json.loads(json.dumps(dataclasses.asdict(benchmark.config)))
    fixed = {name: value for name, value in flags.items() if name not in _FREE}
    check_unchanged(directory, fixed, jax.devices()[0].device_kind)


def check_unchanged(directory: RunDirectory, fixed: Mapping[str, Any], device_kind: str) -> None:
    """Refuses to go on with a run that has other flags, or was begun on another device.

    Args:
      directory: of the run.
      fixed: flags that must be as they were, as JSON has them.
      device_kind: JAX's name of the device now.

    Raises:
      InputError: naming what differs.
    """
    before = directory.read_json("config.json")
    if before is None:
        return
    for name, value in fixed.items():
        if before.get(name) != value:
            raise InputError(
                f"--continue: the run in {directory.path} has --{name} {before.get(name)}, and now it is {value}"
            )
    begun_on = (directory.read_json("env.json") or {}).get("device_kind")
    if begun_on not in (None, device_kind):
        raise InputError(f"--continue: the run in {directory.path} was begun on {begun_on}, and this is {device_kind}")


def _warn_of_changes(directory: RunDirectory, about: dict[str, Any]) -> None:
    """Says what differs from where the run was begun: windows of both are put in one table."""
    before, now = (_circumstances(env) for env in (directory.read_json("env.json") or {}, about))
    for what in now:
        if before[what] != now[what]:
            _warn(directory, f"{what}: the run was begun with {before[what]}, and goes on with {now[what]}")


def _circumstances(about: dict[str, Any]) -> dict[str, Any]:
    device = (about.get("gpu") or {}).get("device") or {}
    return {
        "GPU": device.get("uuid"),
        "driver": device.get("driver_version"),
        "power limit, W": device.get("power_limit_w"),
        "source of jaxchunk (sha256)": about.get("source_sha256"),
        "packages": about.get("packages"),
        "environment variables": about.get("variables"),
    }


def _warn_of_temperatures(directory: RunDirectory, protocol: Protocol, measurements: Sequence[Measurement]) -> None:
    target_c = (directory.read_json("conditions.json") or {}).get("start_temperature_c")
    tolerance_c = protocol.temperature_tolerance_c
    if target_c is None or tolerance_c is None:
        return
    starts_c = [m.start_temperature_c for m in measurements if m.start_temperature_c is not None]
    if off := sum(abs(start_c - target_c) > tolerance_c for start_c in starts_c):
        _warn(
            directory,
            f"{off} of {len(measurements)} windows began more than {tolerance_c:.0f} °C from the common "
            f"{target_c:.0f} °C; a larger --settle_s gives them more time",
        )


def _warn(directory: RunDirectory, warning: str) -> None:
    _logger.warning("warning: %s", warning)
    directory.append("warnings.jsonl", {"unix_s": time.time(), "warning": warning})
