"""Energy, power, clocks and throttling of a device, measured from the side.

No numerics import this package, and it imports none of them (the watcher only waits for JAX's arrays). Typical use:

    with open_monitor(jax.devices()[0], csv_path="telemetry.csv") as monitor:
        start_s = monitor.now()
        ...
        window = monitor.window(start_s, end_s)  # .energy_j is None, with a reason, where it is not known

`Monitor` is the facade; `NvmlDevice` and `SimulatedDevice` are the devices; `curve` and `energy` say how a window's
joules and their error bound are made; `CompletionWatcher` tells when a step was complete.
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
from jaxchunk.telemetry.monitor import Monitor, Window, open_monitor
from jaxchunk.telemetry.nvml import NvmlDevice, all_devices, find_device
from jaxchunk.telemetry.sampler import EnergySource
from jaxchunk.telemetry.samples import Samples
from jaxchunk.telemetry.simulated import SimulatedDevice
from jaxchunk.telemetry.watcher import CompletionWatcher

__all__ = [
    "CALLS",
    "THROTTLE_REASONS",
    "CompletionWatcher",
    "Device",
    "DeviceNotFound",
    "EnergySource",
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
