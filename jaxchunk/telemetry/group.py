"""One monitor or several behind one face, and how a monitor is opened for JAX devices."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jaxchunk.telemetry.device import ReadError
from jaxchunk.telemetry.monitor import Monitor
from jaxchunk.telemetry.nvml import JaxDevice, find_device
from jaxchunk.telemetry.rails import Rail, find_rails
from jaxchunk.telemetry.samples import Samples
from jaxchunk.telemetry.tracks import EnergySource, ReadErrors
from jaxchunk.telemetry.window import Window, summed


class GroupMonitor:
    """Several devices measured together: what `Monitor` does, with joules, watts and throttle seconds added up.

    Windows are those of all devices; `of` narrows them. Samples are those of the first device.
    """

    def __init__(self, monitors: Sequence[Monitor]):
        self._monitors = tuple(monitors)
        self._first = self._monitors[0]
        self.now = self._first.now
        self.device = self._first.device
        self.probes = self._first.probes
        self.energy_source: EnergySource | None = self._first.energy_source
        self.energy_source_reason = self._first.energy_source_reason

    def of(self, devices: Sequence[int]) -> "AnyMonitor":
        """The monitor of some of the devices, by their place in the group.

        Raises:
          ValueError: none is asked for, or one that is not there.
        """
        if not devices or any(not 0 <= i < len(self._monitors) for i in devices):
            raise ValueError(
                f"devices {tuple(devices)}: this monitor has devices at places 0 to {len(self._monitors) - 1}"
            )
        chosen = [self._monitors[i] for i in devices]
        return chosen[0] if len(chosen) == 1 else GroupMonitor(chosen)

    @property
    def start_s(self) -> float:
        """See `Monitor`."""
        return self._first.start_s

    @property
    def errors(self) -> dict[str, ReadErrors]:
        """See `Monitor`; names carry the device's place."""
        return {f"{i}: {name}": e for i, m in enumerate(self._monitors) for name, e in m.errors.items()}

    @property
    def sampler_cpu_s(self) -> float:
        """See `Monitor`; of all devices."""
        return sum(monitor.sampler_cpu_s for monitor in self._monitors)

    def start(self, elapsed_s: float = 0.0) -> Self:
        """See `Monitor`."""
        for monitor in self._monitors:
            monitor.start(elapsed_s)
        return self

    def stop(self) -> None:
        """See `Monitor`."""
        for monitor in self._monitors:
            monitor.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def ready(self, end_s: float) -> bool:
        """See `Monitor`."""
        return all(monitor.ready(end_s) for monitor in self._monitors)

    def wait_ready(self, end_s: float, timeout_s: float) -> bool:
        """See `Monitor`."""
        deadline_s = time.monotonic() + timeout_s
        ready = [m.wait_ready(end_s, max(deadline_s - time.monotonic(), 0.0)) for m in self._monitors]
        return all(ready)

    def attend(self) -> None:
        """See `Monitor`."""
        for monitor in self._monitors:
            monitor.attend()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """See `Monitor`."""
        with contextlib.ExitStack() as stack:
            for monitor in self._monitors:
                stack.enter_context(monitor.paused())
            yield

    def window(self, start_s: float, end_s: float) -> Window:
        """The sum over the devices; `parts` has each of them."""
        return summed([monitor.window(start_s, end_s) for monitor in self._monitors])

    def samples(self, start_s: float = -math.inf, end_s: float = math.inf) -> Samples:
        """See `Monitor`; of the first device."""
        return self._first.samples(start_s, end_s)

    def energy_ticks_s(self, start_s: float, end_s: float) -> list[float]:
        """None: several counters have no ticks in common."""
        return []

    def forget_before(self, time_s: float) -> None:
        """See `Monitor`."""
        for monitor in self._monitors:
            monitor.forget_before(time_s)

    def describe(self) -> dict[str, Any]:
        """What the first device says, and all of them under `devices`."""
        return self._first.describe() | {"devices": [monitor.describe() for monitor in self._monitors]}


AnyMonitor = Monitor | GroupMonitor


def open_monitor(
    jax_devices: JaxDevice | Sequence[JaxDevice],
    *,
    csv_path: Path | str | None = None,
    append_csv: bool = False,
    record_path: Path | str | None = None,
    rails: Sequence[Rail] | None = None,
) -> AnyMonitor:
    """A monitor of JAX devices, whatever they are: on a CPU, or without NVML, one that knows why it knows nothing.

    Args:
      jax_devices: one device, or several that are measured together.
      csv_path: where the raw samples go; those of a second device into the same name with `-gpu1`, and so on.
      append_csv: go on with files that are there.
      record_path: where every reading goes, for `Monitor.replay`; named likewise.
      rails: meters of the host. Default: those that are found.

    Raises:
      InputError: a file cannot be written.
    """
    devices = list(jax_devices) if isinstance(jax_devices, Sequence) else [jax_devices]
    host = find_rails() if rails is None else list(rails)
    monitors = []
    for place, jax_device in enumerate(devices):
        options: Mapping[str, Any] = {
            "rails": host if place == 0 else (),
            "csv_path": _for_device(csv_path, place),
            "append_csv": append_csv,
            "record_path": _for_device(record_path, place),
        }
        monitors.append(_open(jax_device, options))
    return monitors[0] if len(monitors) == 1 else GroupMonitor(monitors)


def _open(jax_device: JaxDevice, options: Mapping[str, Any]) -> Monitor:
    if jax_device.platform not in ("gpu", "cuda"):
        return Monitor(None, reason_if_none=f"JAX runs on {jax_device.platform}: no GPU to measure", **options)
    try:
        return Monitor(find_device(jax_device), **options)
    except ReadError as error:
        return Monitor(None, reason_if_none=f"NVML not available: {error.reason}", **options)


def _for_device(path: Path | str | None, place: int) -> Path | None:
    if path is None or place == 0:
        return None if path is None else Path(path)
    return Path(path).with_stem(f"{Path(path).stem}-gpu{place}")
