"""What could spoil a benchmark, looked at before it starts."""

import os
from typing import Any

from jaxchunk.measuring.protocol import Conditions
from jaxchunk.telemetry import AnyMonitor, ReadError

_SLOW_SHARE = 0.5


def other_processes(monitor: AnyMonitor, own: int = 1) -> list[str]:
    """Warnings about processes that compute on the GPU besides `own` ones, this one among them."""
    ask: Any = getattr(monitor.device, "compute_processes", None)
    if ask is None:
        return []
    try:
        processes = dict(ask())
    except ReadError as error:
        return [f"whether something else runs on the GPU is not known: {error.reason}"]
    if os.getpid() in processes:
        del processes[os.getpid()]
        own -= 1
    for _ in range(min(own, len(processes))):
        processes.popitem()  # ours, or this one under its number outside of a container; which it is does not matter
    if not processes:
        return []
    held = [memory for memory in processes.values() if memory]
    memory = f", holding {sum(held) / 1e9:.1f} GB" if held else ""
    return [f"{len(processes)} other process(es) on the GPU{memory}: times and joules are shared with them"]


def stuck_clocks(monitor: AnyMonitor, conditions: Conditions) -> list[str]:
    """A warning where the clocks stayed low under full load although no clock-event reason says why."""
    share = conditions.slow_without_reason
    if share is None or share < _SLOW_SHARE:
        return []
    highest = monitor.probes["sm_clock_max_mhz"].value
    return [
        f"under load the SM clock was below three quarters of its {highest:.0f} MHz for {share:.0%} of the time, and "
        "no clock-event reason says why (a USB-PD supply that negotiated too little does this): figures will be low"
    ]
