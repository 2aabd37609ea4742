"""The log of a meter at the wall socket: joules of the whole machine, power supply included.

Wall joules are not GPU joules: they are reported beside the GPU's and neither added to them nor compared as if equal.
The meter has a clock of its own; `WallMeter.best_lag` tells how far it is from the host's. Nothing applies that lag.
"""

import csv
import datetime
import io
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jaxchunk.errors import InputError

TIME_NAMES = ("timestamp", "time", "ts")
POWER_NAMES = ("power", "power_w", "w", "watts")

# A pause in the log is a gap when it is longer than both of these.
GAP_PERIODS = 5
GAP_MIN_S = 5.0

MAX_LAG_S = 60.0
LAG_STEP_S = 0.1
MIN_LAG_SAMPLES = 10  # a correlation of fewer samples says nothing

# Unix time is 1.8e9 s in 2027, thus 1.8e12 ms: whatever is between these limits is milliseconds.
_MILLISECONDS = (1e11, 1e14)


class WallEnergy(NamedTuple):
    """Joules at the wall over a window, with a bound on the error; or None, and why."""

    energy_j: float | None
    bound_j: float | None
    null_reason: str | None = None


class Lag(NamedTuple):
    """How far the meter's clock is ahead of the host's, in s, and the correlation there; or None, and why."""

    lag_s: float | None
    correlation: float | None
    null_reason: str | None = None


@dataclass(frozen=True)
class WallMeter:
    """Samples of power at the wall socket, in the order of time, no time twice.

    Attributes:
      unix_s: Unix time of each sample, by the meter's clock.
      power_w: power of the whole machine, in W.
      path: the file, for messages.
      timestamps: how the timestamps were understood, for people.
    """

    unix_s: Float[np.ndarray, " samples"]
    power_w: Float[np.ndarray, " samples"]
    path: str = "wall meter"
    timestamps: str = "Unix seconds"

    @classmethod
    def from_csv(cls, path: Path | str) -> "WallMeter":
        """Reads a CSV file of timestamps and watts.

        With a header, the columns are found by name (`TIME_NAMES`, `POWER_NAMES`, in either case); without one they
        are the first and the second. A timestamp is Unix seconds, Unix milliseconds, or ISO 8601; ISO 8601 without
        a zone is taken as this machine's local time, which is ambiguous for an hour when summer time ends. Rows may
        be in any order; rows of the same time become one, with their mean power. A last line without a line end may
        have lost digits, as when the logger is still writing or was killed: it is left out.

        Raises:
          InputError: the file cannot be read, has no data row, or has a row that is no timestamp and power >= 0.
        """
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
            raise InputError(f"wall meter CSV {path} cannot be read: {reason or error}") from None
        text = text[: text.rfind("\n") + 1]
        try:
            samples, timestamps = _parse(text)
        except (InputError, csv.Error) as error:
            raise InputError(f"wall meter CSV {path}, {error}") from None
        unix_s, group = np.unique([time_s for time_s, _ in samples], return_inverse=True)
        power_w = np.bincount(group, weights=[watts for _, watts in samples]) / np.bincount(group)
        return cls(unix_s, power_w, str(path), timestamps)

    @property
    def period_s(self) -> float | None:
        """Median time between samples; None with fewer than two."""
        return float(np.median(np.diff(self.unix_s))) if len(self.unix_s) > 1 else None

    def energy(self, start_unix_s: float, end_unix_s: float) -> WallEnergy:
        """Wall joules of a window by the trapezoidal rule.

        The bound is the sum of

        - half of the sum of |dP| dt over the intervals that the window touches: what a power can matter that stays
          between the two samples around it;
        - one sample period times the range of the samples around each end: the meter averages over about a period;
        - one sample period times the difference between the power at the two ends: a log that is late by d is
          wrong by d times that, and meters stamp the start or the end of what they averaged.

        It bounds the sampling only: neither the meter's accuracy (a percent or more) nor clocks that are further
        apart than a sample period.

        Args:
          start_unix_s: Unix time of the window's start.
          end_unix_s: Unix time of its end.

        Returns:
          The energy and its bound in J; None and the reason where the log has a gap in the window (a pause of more than
          `GAP_PERIODS` median periods and `GAP_MIN_S`).

        Raises:
          InputError: the window is empty, or the log does not cover all of it.
        """
        if not -math.inf < start_unix_s < end_unix_s < math.inf:
            raise InputError(f"a window from {start_unix_s} to {end_unix_s}: the end must be later than the start")
        self._check_covered(start_unix_s, end_unix_s)
        period_s = self.period_s
        assert period_s is not None  # a window that is covered has two samples around it
        first = int(np.searchsorted(self.unix_s, start_unix_s, side="right")) - 1
        last = int(np.searchsorted(self.unix_s, end_unix_s, side="left"))
        lengths_s = np.diff(self.unix_s[first : last + 1])
        longest = int(np.argmax(lengths_s))
        if lengths_s[longest] > max(GAP_PERIODS * period_s, GAP_MIN_S):
            since = _iso(self.unix_s[first + longest])
            return WallEnergy(None, None, f"the wall meter's log has a gap of {lengths_s[longest]:.1f} s from {since}")
        inside = (self.unix_s > start_unix_s) & (self.unix_s < end_unix_s)
        times_s = np.concatenate([[start_unix_s], self.unix_s[inside], [end_unix_s]])
        # Relative to the start: Unix seconds leave a double no more than 0.2 microseconds.
        powers_w = np.interp(times_s - start_unix_s, self.unix_s - start_unix_s, self.power_w)
        steps_w = np.abs(np.diff(self.power_w[first : last + 1]))
        bound_j = float(np.sum(steps_w * lengths_s)) / 2
        bound_j += period_s * (self._range_w(first, first + 1) + self._range_w(last - 1, last))
        bound_j += period_s * abs(float(powers_w[-1] - powers_w[0]))
        return WallEnergy(float(np.trapezoid(powers_w, times_s - start_unix_s)), bound_j)

    def best_lag(
        self,
        time_s: Float[np.ndarray, " gpu_samples"],
        power_w: Float[np.ndarray, " gpu_samples"],
    ) -> Lag:
        """Compares the meter's clock with the host's, by the lag at which the two powers correlate best.

        The GPU's power is averaged over one period of the meter before it is compared. A GPU whose power is periodic
        (step after step) fits at several lags; what tells the clocks apart is a start, an end, or a pause in between.

        Args:
          time_s: Unix times of the GPU's power samples, by the host's clock, increasing.
          power_w: the GPU's power at these times, in W.

        Returns:
          The lag in steps of `LAG_STEP_S`, up to `MAX_LAG_S` either way, and the correlation (-1 to 1) there.
          Positive: the meter's clock is ahead, what the host saw at t stands in the meter's log at t + lag. None, and
          why, where the two hardly overlap, one of them does not vary, or they fit best at the largest lag tried.
        """
        period_s = self.period_s
        if period_s is None or len(time_s) < 2:
            return Lag(None, None, "too few samples to compare the clocks")
        origin_s = float(time_s[0])
        gpu_s, meter_s = np.asarray(time_s, float) - origin_s, self.unix_s - origin_s
        steps = round(MAX_LAG_S / LAG_STEP_S)
        best = _best_lag_step(gpu_s, np.asarray(power_w, float), meter_s, self.power_w, period_s, steps)
        if best is None:
            return Lag(None, None, "the two logs overlap too little, or the power does not vary")
        step, correlation = best
        if abs(step) == steps:
            return Lag(None, None, f"the powers fit best at the largest lag tried, {MAX_LAG_S:g} s")
        return Lag(step * LAG_STEP_S, correlation)

    def _range_w(self, first: int, last: int) -> float:
        """Range of the samples from `first` to `last` and one more on each side."""
        return float(np.ptp(self.power_w[max(first - 1, 0) : last + 2]))

    def _check_covered(self, start_s: float, end_s: float) -> None:
        log_start_s, log_end_s = float(self.unix_s[0]), float(self.unix_s[-1])
        if log_start_s <= start_s and end_s <= log_end_s:
            return
        ranges = (
            f"wall meter CSV {self.path} goes from {_iso(log_start_s)} to {_iso(log_end_s)} ({self.timestamps}), "
            f"the window from {_iso(start_s)} to {_iso(end_s)}"
        )
        if log_end_s < start_s:
            raise InputError(f"{ranges}: the log ends {start_s - log_end_s:.1f} s before the window starts")
        if end_s < log_start_s:
            raise InputError(f"{ranges}: the log starts {log_start_s - end_s:.1f} s after the window ends")
        missing = [
            f"the {where} {seconds:.1f} s"
            for where, seconds in (("first", log_start_s - start_s), ("last", end_s - log_end_s))
            if seconds > 0
        ]
        raise InputError(f"{ranges}: {' and '.join(missing)} of the window are missing")


def _parse(text: str) -> tuple[list[tuple[float, float]], str]:
    """The rows as (Unix time in s, W), and how the timestamps were understood."""
    reader = csv.reader(io.StringIO(text, newline=""))
    time_column, power_column, width = 0, 1, 2
    cells: list[tuple[int, str | float, float]] = []  # line number, timestamp, W
    seen_row = False
    for row in reader:
        row = [cell.strip() for cell in row]
        if not any(row):
            continue
        header = None if seen_row else _find_columns(row, reader.line_num)
        seen_row = True
        if header is not None:
            (time_column, power_column), width = header, len(row)
            continue
        if len(row) != width:
            raise InputError(f"line {reader.line_num} has {len(row)} columns; {width} are needed")
        watts = _number(row[power_column])
        if watts is None:
            raise InputError(f"line {reader.line_num}: power {row[power_column]!r} is not a number of watts")
        if watts < 0:
            raise InputError(f"line {reader.line_num}: power {row[power_column]} W is negative")
        number = _number(row[time_column])
        cells.append((reader.line_num, row[time_column] if number is None else number, watts))
    if not cells:
        raise InputError("it has no complete data row; needed are rows of a timestamp and watts")
    return _to_unix_s(cells)


def _find_columns(row: list[str], line: int) -> tuple[int, int] | None:
    """Where the two columns are, if the first row is a header: has a known name, or no number.

    Raises:
      InputError: the header has not exactly one timestamp and one power.
    """
    names = [cell.lower() for cell in row]
    columns = []
    for wanted in (TIME_NAMES, POWER_NAMES):
        columns.append([i for i, name in enumerate(names) if name in wanted])
    if not any(columns) and any(_number(cell) is not None for cell in row):
        return None
    if [len(found) for found in columns] != [1, 1]:
        raise InputError(
            f"line {line}: the header {','.join(row)!r} needs one column of {'/'.join(TIME_NAMES)} "
            f"and one of {'/'.join(POWER_NAMES)}"
        )
    return columns[0][0], columns[1][0]


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and "_" not in text else None


def _to_unix_s(cells: list[tuple[int, str | float, float]]) -> tuple[list[tuple[float, float]], str]:
    numbers = [time for _, time, _ in cells if not isinstance(time, str)]
    typical = statistics.median(map(abs, numbers)) if numbers else 0.0
    unit_s = 1e-3 if typical >= _MILLISECONDS[0] else 1.0
    low, high = _MILLISECONDS if unit_s == 1e-3 else (0.0, _MILLISECONDS[0])
    samples, local = [], False
    for line, time, watts in cells:
        if isinstance(time, str):
            try:
                moment = datetime.datetime.fromisoformat(time)
            except ValueError:
                raise InputError(
                    f"line {line}: timestamp {time!r} is neither Unix time nor ISO 8601 (2026-11-23T18:04:05Z)"
                ) from None
            local = local or moment.tzinfo is None
            samples.append((moment.timestamp(), watts))
        elif low <= time < high:
            samples.append((time * unit_s, watts))
        else:
            unit = "milliseconds" if unit_s == 1e-3 else "seconds"
            raise InputError(f"line {line}: timestamp {time:.15g} is not Unix {unit}, as the others seem to be")
    if not numbers:
        return samples, "ISO 8601; without a zone, taken as local time" if local else "ISO 8601"
    unit = "Unix milliseconds" if unit_s == 1e-3 else "Unix seconds"
    return samples, unit if len(numbers) == len(cells) else f"{unit} and ISO 8601"


def _best_lag_step(
    gpu_s: np.ndarray, gpu_w: np.ndarray, meter_s: np.ndarray, meter_w: np.ndarray, period_s: float, steps: int
) -> tuple[int, float] | None:
    """The lag in steps and its correlation; of lags that fit equally well the smallest."""
    gpu_j = np.concatenate([[0.0], np.cumsum((gpu_w[1:] + gpu_w[:-1]) / 2 * np.diff(gpu_s))])
    half_s = period_s / 2
    found: list[tuple[int, int, float]] = []  # step, number of samples, correlation
    for step in range(-steps, steps + 1):
        times_s = meter_s - step * LAG_STEP_S
        inside = (times_s - half_s >= gpu_s[0]) & (times_s + half_s <= gpu_s[-1])
        count = int(np.count_nonzero(inside))
        if count < MIN_LAG_SAMPLES:
            continue
        times_s = times_s[inside]
        mean_w = (np.interp(times_s + half_s, gpu_s, gpu_j) - np.interp(times_s - half_s, gpu_s, gpu_j)) / period_s
        found.append((step, count, _correlation(mean_w, meter_w[inside])))
    # A lag that leaves only a small part to compare fits by chance.
    enough = max((count for _, count, _ in found), default=0) / 2
    comparable = [(value, -abs(step), step) for step, count, value in found if count >= enough and math.isfinite(value)]
    if not comparable:
        return None
    best = max(value for value, _, _ in comparable)
    value, _, step = max((entry for entry in comparable if entry[0] > best - 1e-9), key=lambda entry: entry[1])
    return step, value


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; NaN where one does not vary beyond rounding."""
    x_deviation, y_deviation = x - x.mean(), y - y.mean()
    x_norm, y_norm = float(np.linalg.norm(x_deviation)), float(np.linalg.norm(y_deviation))
    for norm, values in ((x_norm, x), (y_norm, y)):
        if norm <= 1e-9 * float(np.linalg.norm(values)):
            return math.nan
    return float(x_deviation @ y_deviation) / (x_norm * y_norm)


def _iso(unix_s: float) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(float(unix_s), datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return f"{unix_s:g} s"  # beyond the calendar
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
