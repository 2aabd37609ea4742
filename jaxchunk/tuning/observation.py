"""What the policy sees: one window of steps, and which of its signals are watched for drift."""

import math
from typing import NamedTuple


class Signal(NamedTuple):
    """What is watched for drift: the smallest change that matters, and the least standard deviation of a window."""

    change: float
    least_std: float


SIGNALS = {
    "cost": Signal(0.01, 0.001),  # of its logarithm
    "temperature": Signal(3.0, 0.5),  # degrees Celsius
    "clock": Signal(0.02, 0.002),  # of its logarithm
    "throttle": Signal(0.2, 0.02),  # share of the time
}


class Observation(NamedTuple):
    """One window of steps with one chunk count; None is unknown.

    `cost` is positive and per step, whatever is to be small: seconds, joules, or their product.
    """

    num_chunks: int
    seconds: float
    cost: float | None
    temperature_c: float | None = None
    clock_mhz: float | None = None
    throttle_share: float | None = None

    def signals(self) -> dict[str, float]:
        """What of it is known and watched for drift."""
        known = {
            "cost": finite_log(self.cost),
            "temperature": self.temperature_c,
            "clock": finite_log(self.clock_mhz),
            "throttle": self.throttle_share,
        }
        return {name: value for name, value in known.items() if value is not None}


def finite_log(value: float | None) -> float | None:
    """The logarithm of a positive number; None of anything else."""
    return math.log(value) if value is not None and 0 < value < math.inf else None


def change_in_words(name: str, before: float, after: float) -> str:
    """Of the level of a signal."""
    if name == "temperature":
        return f"{after - before:+.1f} C"
    if name == "throttle":
        return f"{100 * (after - before):+.0f}% of the time"
    return f"{100 * math.expm1(after - before):+.1f}%"
