"""What happened over a stretch of time."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Self, get_args

from jaxchunk.telemetry.tracks import EnergySource

# An energy whose bound is larger than this fraction of it is not reported.
MAX_RELATIVE_BOUND = 0.10


@dataclasses.dataclass(frozen=True)
class CrossCheck:
    """The same window's joules by a second source.

    Attributes:
      source: the second source.
      energy_j: its joules.
      energy_bound_j: their bound.
      disagreement: (second - first) / first.
    """

    source: EnergySource
    energy_j: float
    energy_bound_j: float
    disagreement: float


@dataclasses.dataclass(frozen=True)
class Window:
    """What happened on the device from `start_s` to `end_s` (times of `Monitor.now()`).

    Joules and watts are those of the GPU's own rail: not of the wall socket. None means unknown, never zero;
    `energy_null_reason` says why there is no energy.

    Attributes:
      start_s: its start.
      end_s: its end.
      energy_j: joules.
      energy_bound_j: the error of `energy_j` is at most this (see jaxchunk.telemetry.energy).
      energy_source: where they come from.
      energy_null_reason: why there are none.
      power_w: energy_j / time; without energy the mean of the power samples.
      sm_clock_mhz: mean of the samples, or the nearest one.
      temperature_c: the last sample.
      throttle: seconds by clock-event reason; reasons that are unknown are left out.
      slow_without_reason_s: seconds with clocks below three quarters of the highest and no reason for it. A GPU
        without work has such clocks too: it says something of windows full of work.
      cross_check: joules by a second source, where there is one.
      rails_j: joules of the host's meters, by name.
      invalid_reason: why nothing of this window should be averaged (a gap in the readings), or None.
      parts: the windows of each device, where there are several.
    """

    start_s: float
    end_s: float
    energy_j: float | None
    energy_bound_j: float | None
    energy_source: EnergySource | None
    energy_null_reason: str | None
    power_w: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: dict[str, float] | None
    slow_without_reason_s: float | None = None
    cross_check: CrossCheck | None = None
    rails_j: dict[str, float] | None = None
    invalid_reason: str | None = None
    parts: tuple["Window", ...] = ()

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """From what `dataclasses.asdict` gave, through JSON."""
        check, parts = values["cross_check"], values["parts"]
        nested = {
            "cross_check": None if check is None else CrossCheck(**check),
            "parts": tuple(map(cls.from_dict, parts)),
        }
        return cls(**values | nested)

    @classmethod
    def unknown(cls, start_s: float, end_s: float, reason: str) -> Self:
        """A window of which nothing is known."""
        return cls(start_s, end_s, None, None, None, reason, None, None, None, None)

    @property
    def devices(self) -> tuple["Window", ...]:
        """The windows of each device, also where there is one."""
        return self.parts or (self,)


def summed(parts: Sequence[Window]) -> Window:
    """One window of several devices: joules, watts, throttle seconds added, clocks averaged, the highest temperature.

    What is unknown for one device is unknown for all of them.
    """
    first = parts[0]
    reasons = [f"device {i}: {p.energy_null_reason}" for i, p in enumerate(parts) if p.energy_null_reason is not None]
    invalid = [f"device {i}: {p.invalid_reason}" for i, p in enumerate(parts) if p.invalid_reason is not None]
    clock_mhz = _total([part.sm_clock_mhz for part in parts])
    temperatures_c = [part.temperature_c for part in parts if part.temperature_c is not None]
    return Window(
        start_s=first.start_s,
        end_s=first.end_s,
        energy_j=_total([part.energy_j for part in parts]),
        energy_bound_j=_total([part.energy_bound_j for part in parts]),
        energy_source=_worst_source(parts),
        energy_null_reason=_joined(reasons, [part.energy_null_reason for part in parts]),
        power_w=_total([part.power_w for part in parts]),
        sm_clock_mhz=None if clock_mhz is None else clock_mhz / len(parts),
        temperature_c=max(temperatures_c) if len(temperatures_c) == len(parts) else None,
        throttle=_total_by_name([part.throttle for part in parts]),
        slow_without_reason_s=_total([part.slow_without_reason_s for part in parts]),
        rails_j=first.rails_j,  # of the host, which is one
        invalid_reason="; ".join(invalid) or None,
        parts=tuple(parts),
    )


def _joined(by_device: list[str], reasons: list[str | None]) -> str | None:
    """Each device's reason, or once the one that all of them have."""
    if len(set(reasons)) > 1:
        return "; ".join(by_device)
    return None if reasons[0] is None else f"all devices: {reasons[0]}"


def _worst_source(parts: Sequence[Window]) -> EnergySource | None:
    """The source that is least preferred, because the sum is no better; None where a device has none."""
    preference: tuple[EnergySource, ...] = get_args(EnergySource)
    sources = [part.energy_source for part in parts if part.energy_source is not None]
    return max(sources, key=preference.index) if len(sources) == len(parts) else None


def _total(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _total_by_name(values: Sequence[dict[str, float] | None]) -> dict[str, float] | None:
    known = [value for value in values if value is not None]
    if len(known) != len(values):
        return None
    return {name: sum(value[name] for value in known) for name in known[0] if all(name in value for value in known)}
