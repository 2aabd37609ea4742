"""Power samples that the device itself takes and keeps, and a counter's joules distributed by them."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Sequence

from jaxchunk.telemetry.curve import Difference, unknown
from jaxchunk.telemetry.device import PowerSamples
from jaxchunk.telemetry.energy import CounterCurve
from jaxchunk.telemetry.power import PowerCurve
from jaxchunk.telemetry.reading import Reading

READ_S = 1.0  # between two readings of the buffer, at most
READ_SHARE = 0.4  # of what the buffer holds, likewise: the next reading may be late
# The counter is compared with the samples over so long a stretch, where the past goes back so far: its ticks are not
# known better than some milliseconds.
STRETCH_S = 2.0


class SampleCurve(PowerCurve):
    """Joules from samples that the device takes by itself at equal intervals (an H200 every 20 ms).

    Every sample is a knot. How the device comes by a sample is not documented: which part of the time between two
    samples one stands for is left open, and the bound of `PowerCurve` has one interval times the range of the samples
    more. Equal intervals can be in step with a load that swings at their rhythm, so the bound is no less than `IN_STEP`
    of the energy: power that swings by more than that, in step, for a whole window, is not bounded.
    """

    IN_STEP = 0.05
    KNOTS_BEYOND = 2  # the bound looks at the neighbour as well
    MAX_APART = 5.0  # usual distances; a longer one is a hole in the samples
    JITTER = 0.1  # of the usual distance; how far a sample may be from its time

    def __init__(self) -> None:
        super().__init__("the device's power samples", READ_S)
        self._apart_s = 0.0  # usual distance of two samples

    def add_samples(self, start_s: float, end_s: float, samples: Sequence[tuple[float, float]]) -> None:
        """Adds the answer, in (seconds, W), to a question asked at `start_s` and answered at `end_s`."""
        self._note_reading(start_s, end_s)
        self._apart_s = _usual_distance_s(samples) or self._apart_s
        for time_s, power_w in samples:
            continuous = True
            if self._times_s:
                last_s = self._times_s[-1]
                if time_s <= last_s:
                    continue
                if self._apart_s and time_s - last_s > self.MAX_APART * self._apart_s:
                    self._add_break(last_s, time_s, f"{self.what} have a hole of {time_s - last_s:.2f} s")
                    continuous = False
            self._add_knot(time_s, power_w, self.JITTER * self._apart_s, continuous=continuous)

    def difference(self, start_s: float, end_s: float) -> Difference:
        """Joules from `start_s` to `end_s`, with the bound of the class's docstring."""
        missing = self._missing(start_s, end_s)
        if missing is not None:
            return missing
        energy_j = self._value_at(end_s) - self._value_at(start_s)
        bound_j = self._bound_j(start_s, end_s, self._apart_s)
        return Difference(energy_j, max(bound_j, self.IN_STEP * energy_j))


def _usual_distance_s(samples: Sequence[tuple[float, float]]) -> float:
    """Median time between two samples, 0 where there are fewer; a clock that was set among them does not matter."""
    apart_s = [after[0] - before[0] for before, after in itertools.pairwise(samples)]
    return statistics.median(apart_s) if apart_s else 0.0


class SampleReader:
    """Finds the new samples in each answer of the device and puts them on the sampler's clock.

    The device's clock said `asked_s` at some time between the question and the answer. All answers together leave an
    interval of distances between the two clocks, of which the middle is taken. Where it is empty, one of the clocks was
    set: then nothing is taken until the device keeps no sample of before.
    """

    DRIFT = 1e-4  # of one clock against the other

    def __init__(self) -> None:
        self._shortest_s, self._longest_s = -math.inf, math.inf
        self._known_s = -math.inf  # when that was
        self._newest_s = -math.inf  # sample seen, by the device's clock
        self._ignored_until_s = -math.inf
        self.kept_s = 0.0  # how far back the device's samples go

    def new(self, reading: Reading) -> Reading:
        """The same reading with the new samples, by the sampler's clock; or why there are none."""
        answer, start_s, end_s = reading.value, reading.start_s, reading.end_s
        if not isinstance(answer, PowerSamples):
            return reading
        self.kept_s = len(answer.samples) * _usual_distance_s(answer.samples) or self.kept_s
        drift_s = self.DRIFT * (end_s - self._known_s) if math.isfinite(self._known_s) else 0.0
        shortest_s = max(self._shortest_s - drift_s, start_s - answer.asked_s)
        longest_s = min(self._longest_s + drift_s, end_s - answer.asked_s)
        self._known_s = end_s
        if shortest_s > longest_s:
            self._shortest_s, self._longest_s = start_s - answer.asked_s, end_s - answer.asked_s
            self._newest_s, self._ignored_until_s = answer.asked_s, end_s + self.kept_s
        else:
            self._shortest_s, self._longest_s = shortest_s, longest_s
        if end_s < self._ignored_until_s:
            return dataclasses.replace(reading, value=None, error="the clock of the device's power samples was set")
        ahead_s = (self._shortest_s + self._longest_s) / 2
        new = [(time_s, power_w) for time_s, power_w in answer.samples if time_s > self._newest_s]
        if new:
            self._newest_s = new[-1][0]
        return dataclasses.replace(
            reading, value=PowerSamples(answer.asked_s + ahead_s, [(t + ahead_s, power_w) for t, power_w in new])
        )


def distribute(counter: CounterCurve, samples: SampleCurve, start_s: float, end_s: float) -> Difference:
    """The counter's joules of a stretch around a window, of which the window gets the samples' share.

    Over a stretch between two of its ticks the counter gave E joules and the samples give S. A window in it, of which
    the samples give s with a bound b, has s E / S. Let the true joules of the window be s + d, |d| <= b. Then the error
    is d - s (E - S) / S, so the bound is b + |E / S - 1| s, and s / S of E's own.
    """
    share = samples.difference(start_s, end_s)
    if share.value is None or share.bound is None:
        return share
    stretch = counter.stretch_around(start_s, end_s, STRETCH_S)
    if stretch is None:
        return counter.difference(start_s, end_s)  # which is not known either, and says why
    for around in (stretch, counter.stretch_around(start_s, end_s, 0.0) or stretch):
        total, counted = samples.difference(*around), counter.difference(*around)
        if total.value and counted.value is not None and counted.bound is not None:
            scale = counted.value / total.value
            bound_j = share.bound + abs(scale - 1.0) * share.value + counted.bound * share.value / total.value
            return Difference(share.value * scale, bound_j)
    return unknown("the device's power samples do not reach to the counter's ticks around the window")
