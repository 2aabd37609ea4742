"""What a device can be asked, and the one probe that finds out which questions it answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

# The calls of `Device` that read a quantity, in the order in which they are probed.
CALLS = (
    "total_energy_j",
    "power_instant_w",
    "power_average_w",
    "power_samples_w",
    "sm_clock_mhz",
    "temperature_c",
    "throttle_s",
    "power_limit_w",
    "sm_clock_max_mhz",
)

# The clock-event reasons whose time is counted. The others (idle, application clocks) are no throttling.
THROTTLE_REASONS = ("sw_power_cap", "sw_thermal", "hw_thermal", "hw_power_brake", "sync_boost")


class PowerSamples(NamedTuple):
    """Samples of power that the device took by itself.

    Attributes:
      asked_s: when it was asked, by the clock of the samples.
      samples: time in s, by a clock of the device's, and W; the oldest first.
    """

    asked_s: float
    samples: list[tuple[float, float]]


Value = float | dict[str, float] | PowerSamples


class ReadError(Exception):
    """A device did not answer; `reason` says why in a few words."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class NotSupported(ReadError):  # noqa: N818 (an answer, not a fault)
    """The device says that it does not have this quantity."""


class ReadFailed(ReadError):  # noqa: N818
    """Any other failure to read: permission, a lost GPU, a driver that lacks the function."""


class DeviceNotFound(ReadError):  # noqa: N818
    """There is no device to read from: no driver, no NVML, or no GPU with that UUID."""


class Device(Protocol):
    """One GPU that can be read. Every reading method raises `NotSupported` or `ReadFailed`."""

    @property
    def name(self) -> str:
        """The product name, for people: nothing is ever decided by it."""

    @property
    def uuid(self) -> str:
        """The identity that survives reordering (`CUDA_VISIBLE_DEVICES`)."""

    def total_energy_j(self) -> float:
        """Joules since some origin, as a counter that the device advances in ticks."""

    def power_instant_w(self) -> float:
        """Power now, in W."""

    def power_average_w(self) -> float:
        """Power averaged by the device over about the last second, in W."""

    def power_samples_w(self) -> PowerSamples:
        """The latest samples of power that the device took by itself, as far back as it keeps them."""

    def sm_clock_mhz(self) -> float:
        """Clock of the streaming multiprocessors, in MHz."""

    def temperature_c(self) -> float:
        """Temperature of the GPU die, in degrees Celsius."""

    def throttle_s(self) -> dict[str, float]:
        """Seconds since some origin in each of `THROTTLE_REASONS`; reasons that are unknown are left out."""

    def power_limit_w(self) -> float:
        """The power limit in force, in W."""

    def sm_clock_max_mhz(self) -> float:
        """The highest clock that the streaming multiprocessors can have, in MHz."""

    def describe(self) -> dict[str, object]:
        """What identifies the device, for `env.json`."""


@dataclass(frozen=True)
class Probe:
    """How a device answered one call the first time that it was asked."""

    status: Literal["supported", "not_supported", "failed"]
    reason: str | None = None
    value: Value | None = None

    @property
    def supported(self) -> bool:
        """Whether the call may be made again."""
        return self.status == "supported"

    def __str__(self) -> str:
        label = self.status.replace("_", " ")
        return label if self.reason is None else f"{label} ({self.reason})"


def read(device: Device, call: str) -> Value:
    """Makes one call by its name in `CALLS`.

    Raises:
      NotSupported: the device says so.
      ReadFailed: anything else, whatever the library underneath raised.
    """
    try:
        value = getattr(device, call)()
        return value if isinstance(value, dict | PowerSamples) else float(value)
    except ReadError:
        raise
    except Exception as error:
        raise ReadFailed(f"{type(error).__name__}: {error}") from error


def probe(device: Device) -> Mapping[str, Probe]:
    """Makes each call once. What did not answer here is never asked again (and never becomes 0)."""
    probes = {}
    for call in CALLS:
        try:
            value = read(device, call)
            # What samples the device had then is of no use to anybody.
            probes[call] = Probe("supported", value=None if isinstance(value, PowerSamples) else value)
        except NotSupported as error:
            probes[call] = Probe("not_supported", error.reason)
        except ReadError as error:
            probes[call] = Probe("failed", error.reason)
    return probes
