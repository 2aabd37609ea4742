"""The raw samples: in memory for plots and means, and as a CSV file."""

import csv
import math
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxchunk.errors import InputError
from jaxchunk.run_dir import cut_to_whole_lines
from jaxchunk.telemetry.reading import Reading

CSV_COLUMNS = ("time_s", "power_w", "sm_clock_mhz", "temperature_c", "total_energy_j")
CSV_FLUSH_S = 1.0


@dataclass(frozen=True)
class Samples:
    """Samples in order of time; every array has shape [samples] and NaN where nothing could be read.

    `time_s` is the monitor's clock (`Monitor.now()`), as in its windows.
    """

    time_s: np.ndarray
    power_w: np.ndarray
    sm_clock_mhz: np.ndarray
    temperature_c: np.ndarray


class SampleLog:
    """The samples of a run, 32 bytes each. Not safe for threads: the sampler holds a lock around it."""

    def __init__(self) -> None:
        self._time_s = array("d")
        self._columns = {name: array("d") for name in ("power_w", "sm_clock_mhz", "temperature_c")}

    def add(self, time_s: float, *, power_w: float, sm_clock_mhz: float, temperature_c: float) -> None:
        """Adds one sample; NaN for what could not be read."""
        self._time_s.append(time_s)
        self._columns["power_w"].append(power_w)
        self._columns["sm_clock_mhz"].append(sm_clock_mhz)
        self._columns["temperature_c"].append(temperature_c)

    def between(self, start_s: float, end_s: float) -> Samples:
        """A copy of the samples taken from `start_s` to `end_s`, ends included."""
        kept = slice(bisect_left(self._time_s, start_s), bisect_right(self._time_s, end_s))
        return Samples(np.array(self._time_s[kept]), **{k: np.array(v[kept]) for k, v in self._columns.items()})

    def power_range(self, start_s: float, end_s: float) -> tuple[float, float] | None:
        """Smallest and largest power in W between two times; None where there is none."""
        kept = slice(bisect_left(self._time_s, start_s), bisect_right(self._time_s, end_s))
        powers_w = [power for power in self._columns["power_w"][kept] if not math.isnan(power)]
        return (min(powers_w), max(powers_w)) if powers_w else None

    def mean(self, column: str, start_s: float, end_s: float, *, reach_s: float) -> float | None:
        """Mean of a column over a window; with no sample inside, the nearest one within `reach_s` of it."""
        near = self.between(start_s - reach_s, end_s + reach_s)
        values = getattr(near, column)
        known = ~np.isnan(values)
        inside = known & (near.time_s >= start_s) & (near.time_s <= end_s)
        if inside.any():
            return float(values[inside].mean())
        if not known.any():
            return None
        distance_s = np.maximum(start_s - near.time_s, near.time_s - end_s)
        return float(values[known][np.argmin(distance_s[known])])

    def longest_pause_s(self, start_s: float, end_s: float) -> float:
        """Longest time without a sample between two times."""
        inside = self._time_s[bisect_left(self._time_s, start_s) : bisect_right(self._time_s, end_s)]
        return float(np.max(np.diff(np.array([start_s, *inside, end_s]))))

    def last(self, column: str, end_s: float, *, reach_s: float) -> float | None:
        """The last value of a column at or before `end_s`, not older than `reach_s`."""
        values = getattr(self.between(end_s - reach_s, end_s), column)
        known = values[~np.isnan(values)]
        return float(known[-1]) if known.size else None

    def forget_before(self, time_s: float) -> None:
        """Drops older samples."""
        count = bisect_left(self._time_s, time_s)
        del self._time_s[:count]
        for column in self._columns.values():
            del column[:count]


class SampleFile:
    """`telemetry.csv`: one row a sample, times from the start of the run, an empty field for what is missing."""

    name = "telemetry.csv"

    def __init__(self, path: Path | str, *, append: bool = False):
        """Creates the file, or goes on with one that is there (`append`); times are counted from `zero_s`.

        Raises:
          InputError: it cannot be written.
        """
        self.zero_s = 0.0
        try:
            if append and Path(path).exists():
                cut_to_whole_lines(Path(path))
            going_on = append and Path(path).exists() and Path(path).stat().st_size > 0
            self._file = Path(path).open("a" if going_on else "w", newline="", encoding="utf-8")  # noqa: SIM115 (close)
        except OSError as error:
            raise InputError(f"cannot write telemetry to {path}: {error.strerror}") from error
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not going_on:
            self._writer.writerow(CSV_COLUMNS)
        self._flushed_s = -math.inf
        self._energy_j = math.nan

    def add(self, reading: Reading) -> None:
        """Adds a row for a sample, and remembers the energy counter for the next one.

        Raises:
          OSError: the disk refuses.
        """
        if reading.call == "total_energy_j":
            self._energy_j = reading.value if isinstance(reading.value, float) else math.nan
        if reading.call != "sample" or not isinstance(reading.value, dict):
            return
        time_s = (reading.start_s + reading.end_s) / 2 - self.zero_s
        sample = reading.value | {"total_energy_j": self._energy_j}
        values = (sample.get(column, math.nan) for column in CSV_COLUMNS[1:])
        # Three decimals: NVML counts milliwatts and millijoules.
        fields = ("" if math.isnan(value) else f"{value:.3f}".rstrip("0").rstrip(".") for value in values)
        self._writer.writerow((f"{time_s:.4f}", *fields))
        if time_s - self._flushed_s >= CSV_FLUSH_S:
            self._file.flush()
            self._flushed_s = time_s

    def close(self) -> None:
        """Writes what is buffered and closes the file. Raises OSError where the disk refuses."""
        self._file.close()
