"""A microbenchmark's directory as its figures need it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxchunk.bench.microbench_config import MicrobenchConfig, flops_per_call
from jaxchunk.bench.timeline import KernelSpan, read_timeline
from jaxchunk.bench.verdict import Comparison, Row, compare, pair_to_show
from jaxchunk.errors import InputError
from jaxchunk.measuring.harness import RECORDS, read_measurements
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.plotting.style import read_telemetry


@dataclasses.dataclass(frozen=True)
class MicrobenchRun:
    """What a microbenchmark left behind.

    Attributes:
      config: its flags.
      device: the device's name, or that it is unknown.
      flops: of the GEMMs of a call.
      measurements: one a window.
      comparison: computed from the measurements, so that a run that was killed has one too.
      telemetry: columns of `telemetry.csv`, each of shape [samples]; None where there are none.
      timelines: kernels, by label of `pair_to_show`; only those that were recorded.
    """

    config: dict[str, Any]
    device: str
    flops: int
    measurements: list[Measurement]
    comparison: Comparison
    telemetry: dict[str, np.ndarray] | None
    timelines: dict[str, list[KernelSpan]]

    @property
    def title(self) -> str:
        """Device, shape, dtype and workload."""
        config = self.config
        shape = f"M={config['m']} K={config['k']} N={config['n']} {config['dtype']}"
        softmax = sorted({row.softmax for row in self.comparison.rows})
        return f"{self.device}, {shape}, workload {config['workload']} ({', '.join(softmax)})"

    @property
    def series(self) -> dict[tuple[str, str], list[Row]]:
        """Rows that have a time, in order of chunk counts, by inputs ("random" first) and softmax."""
        rows = [row for row in self.comparison.rows if row.time_s is not None]
        keys = sorted({(row.inputs, row.softmax) for row in rows})
        return {
            key: sorted((row for row in rows if (row.inputs, row.softmax) == key), key=lambda row: row.chunks)
            for key in keys
        }

    @property
    def pair(self) -> dict[str, Row]:
        """One chunk and the best of the others, as far as there are, by label of `pair_to_show`."""
        rows = {row.variant: row for row in self.comparison.rows}
        return {label: rows[name] for label, name in pair_to_show(self.comparison).items() if name is not None}

    def series_label(self, inputs: str, softmax: str) -> str:
        """A name for the legend: who does the softmax is said where several do."""
        several = len({row.softmax for row in self.comparison.rows}) > 1
        return f"{inputs}, {softmax}" if several else f"{inputs} inputs"


def is_microbench(run_path: Path) -> bool:
    """Whether a directory holds the records of a microbenchmark, finished or not."""
    if (
        not (run_path / RECORDS).exists()
        or not {"workload", "m", "k", "n"} <= _read_object(run_path / "config.json").keys()
    ):
        return False
    return _read_object(run_path / "run.json").get("benchmark", "microbench") == "microbench"


def read_microbench(run_path: Path) -> MicrobenchRun:
    """Reads a run, also one that was killed.

    Raises:
      InputError: the directory holds no microbenchmark, or nothing was measured.
    """
    if not is_microbench(run_path):
        raise InputError(f"{run_path} holds no records of microbench.py; give the directory that it wrote")
    config = _read_object(run_path / "config.json")
    measurements = read_measurements(run_path)
    if not measurements:
        raise InputError(f"{run_path} holds no whole record; there is nothing to draw")
    known = {field.name for field in dataclasses.fields(MicrobenchConfig)}
    flags = MicrobenchConfig(**{name: value for name, value in config.items() if name in known})
    flops = flops_per_call(flags)
    comparison = compare(measurements, flops, {})
    timelines = {label: read_timeline(run_path / f"timeline-{label}.jsonl") for label in pair_to_show(comparison)}
    return MicrobenchRun(
        config=config,
        device=_read_object(run_path / "env.json").get("device_kind") or "unknown device",
        flops=flops,
        measurements=measurements,
        comparison=comparison,
        telemetry=read_telemetry(run_path / "telemetry.csv"),
        timelines={label: spans for label, spans in timelines.items() if spans},
    )


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file, or something else in it."""
    value = json.loads(path.read_text()) if path.exists() else {}
    return value if isinstance(value, dict) else {}
