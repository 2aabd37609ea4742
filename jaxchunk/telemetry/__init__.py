"""Energy, power, clocks and throttling of a device, measured from the side.

No numerics import this package, and it imports none of them (the watcher only waits for JAX's arrays). Typical use:

    with open_monitor(jax.devices()[0], csv_path="telemetry.csv") as monitor:
        start_s = monitor.now()
        ...
        window = monitor.window(start_s, end_s)  # .energy_j is None, with a reason, where it is not known

`Monitor` is the facade, `GroupMonitor` that of several devices; `NvmlDevice` and `SimulatedDevice` are devices.
Readings flow one way: `sampler` and `schedule` (when to read what) -> `tracks` (what readings add up to) -> `window`
(what is said of a stretch of time); `curve`, `energy` and `ticks` say how joules and their error bound are made,
`recording` keeps the readings for `Monitor.replay`. `CompletionWatcher` tells when a step was complete.
`python -m jaxchunk.telemetry doctor` says what a machine can measure.
"""

from jaxchunk.telemetry.device import (
    CALLS,
    THROTTLE_REASONS,
    Device,
    DeviceNotFound,
    NotSupported,
    Probe,
    ReadError,
    ReadFailed,
    probe,
)
from jaxchunk.telemetry.group import AnyMonitor, GroupMonitor, open_monitor
from jaxchunk.telemetry.monitor import Monitor
from jaxchunk.telemetry.nvml import NvmlDevice, all_devices, find_device
from jaxchunk.telemetry.samples import Samples
from jaxchunk.telemetry.simulation.simulated import SimulatedDevice
from jaxchunk.telemetry.tracks import EnergySource
from jaxchunk.telemetry.watcher import CompletionWatcher
from jaxchunk.telemetry.window import CrossCheck, Window

__all__ = [
    "CALLS",
    "THROTTLE_REASONS",
    "AnyMonitor",
    "CompletionWatcher",
    "CrossCheck",
    "Device",
    "DeviceNotFound",
    "EnergySource",
    "GroupMonitor",
    "Monitor",
    "NotSupported",
    "NvmlDevice",
    "Probe",
    "ReadError",
    "ReadFailed",
    "Samples",
    "SimulatedDevice",
    "Window",
    "all_devices",
    "find_device",
    "open_monitor",
    "probe",
]
