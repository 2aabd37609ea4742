"""What can be measured on this machine, how often it is renewed, and what asking costs: run before long experiments.

`diagnose` asks and returns plain data; `doctor_text.render` makes a text of it. Nothing here starts JAX. None is
always beside a reason: `<key>_null_reason`.
"""

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxchunk.errors import InputError
from jaxchunk.telemetry.device import CALLS, Device, NotSupported, PowerSamples, Probe, ReadError, probe, read
from jaxchunk.telemetry.monitor import choose_energy_source
from jaxchunk.telemetry.power_samples import SampleCurve
from jaxchunk.telemetry.rails import Rail, UnusedSensor
from jaxchunk.telemetry.window import MAX_RELATIVE_BOUND

POLL_PERIOD_S = 0.002  # between two looks at a quantity that is cheap to read
MAX_DUTY = 0.5  # a dear call may take this share of the time, at most
COST_CALLS = 9  # calls of which the cost is the median
MIN_INCREMENTS = 8  # of a counter, for its resolution: fewer may share a divisor by chance
NEVER = "constant during the probe"

_UNITS = {"j": "J", "w": "W", "mhz": "MHz", "c": "degrees C", "s": "s"}


@dataclass(frozen=True)
class Clocks:
    """The times that the doctor goes by; tests give it simulated ones."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep
    cpu_s: Callable[[], float] = time.thread_time  # processor time of this thread


@dataclass
class _Look:
    """What polling one call showed."""

    every_s: float  # time between two looks that is aimed at
    due_s: float
    times_s: list[float] = field(default_factory=list)  # middle of each reading
    values: list[Any] = field(default_factory=list)
    changes_s: list[float] = field(default_factory=list)  # middle between the last look at the old value and the new
    change_values: list[Any] = field(default_factory=list)
    last_start_s: float = math.nan
    failures: int = 0
    last_failure: str | None = None

    def add(self, start_s: float, end_s: float, value: Any) -> None:
        if self.values and value != self.values[-1]:
            self.changes_s.append((self.last_start_s + end_s) / 2)
            self.change_values.append(value)
        self.times_s.append((start_s + end_s) / 2)
        self.values.append(value)
        self.last_start_s = start_s

    @property
    def apart_s(self) -> float | None:
        """Median time between two looks as they were."""
        return statistics.median(np.diff(self.times_s).tolist()) if len(self.times_s) > 1 else None


def diagnose(
    devices: Sequence[Device],
    rails: Iterable[Rail] = (),
    *,
    unused: Iterable[UnusedSensor] = (),
    seconds: float = 3.0,
    no_device_reason: str | None = None,
    clocks: Clocks | None = None,
) -> dict[str, Any]:
    """Asks every device for `seconds` each, and every rail once.

    Args:
      devices: the GPUs.
      rails: the host's meters that can be used.
      unused: those that were seen and are not used.
      seconds: how long each GPU is polled for the rhythm of its readings.
      no_device_reason: why `devices` is empty.
      clocks: what time it is; by default the machine's.

    Returns:
      Data for JSON: `seconds`, `gpus` (a list), `rails`, `unused_sensors`; without a GPU `gpus_null_reason`.

    Raises:
      InputError: `seconds` is not a positive number.
    """
    if not 0 < seconds < math.inf:
        raise InputError(f"seconds is {seconds}, needed is a positive number")
    clocks = clocks or Clocks()
    diagnosis: dict[str, Any] = {
        "seconds": seconds,
        "gpus": [_diagnose_gpu(device, seconds, clocks) for device in devices],
    }
    if not devices:
        diagnosis["gpus_null_reason"] = no_device_reason or "no GPU was given"
    diagnosis["rails"] = [_diagnose_rail(rail) for rail in rails]
    diagnosis["unused_sensors"] = [{"name": sensor.name, "reason": sensor.reason} for sensor in unused]
    return diagnosis


def _diagnose_gpu(device: Device, seconds: float, clocks: Clocks) -> dict[str, Any]:
    probes = probe(device)
    costs = {call: _cost(device, call, clocks) for call in CALLS if probes[call].supported}
    looks = _poll(device, {call: wall_s for call, (_, wall_s) in costs.items()}, seconds, clocks)
    calls = {call: _describe_call(call, probes[call], costs.get(call), looks.get(call)) for call in CALLS}
    source, reason = choose_energy_source(probes)
    processes = _processes(device)
    gpu = _identity(device) | {"calls": calls, "energy_source": source, "energy_source_reason": reason}
    gpu |= _min_step(source, calls)
    gpu |= _throttling(probes["throttle_s"], looks.get("throttle_s")) | processes
    return gpu | {"comparison": _compare(looks, processes.get("other_processes"))}


def _identity(device: Device) -> dict[str, Any]:
    identity: dict[str, Any] = {"name": device.name, "uuid": device.uuid}
    try:
        plain = (str, int, float, type(None))
        identity |= {key: fact if isinstance(fact, plain) else str(fact) for key, fact in device.describe().items()}
    except Exception as error:
        identity["describe_null_reason"] = f"{type(error).__name__}: {error}"
    for key in ("pci_bus_id", "driver_version", "cuda_driver_version"):
        if identity.setdefault(key, None) is None:
            identity.setdefault(f"{key}_null_reason", "the device does not tell")
    return identity


def _processes(device: Device) -> dict[str, Any]:
    """The processes that compute on the GPU, this one left out."""
    ask = getattr(device, "compute_processes", None)
    if ask is None:
        return {"other_processes": None, "other_processes_null_reason": "the device cannot list them"}
    try:
        return {"other_processes": [{"pid": pid, "bytes": size} for pid, size in ask() if pid != os.getpid()]}
    except ReadError as error:
        reason = error.reason
    except Exception as error:  # such as a function that an old NVML does not have
        reason = f"{type(error).__name__}: {error}"
    return {"other_processes": None, "other_processes_null_reason": reason}


def _cost(device: Device, call: str, clocks: Clocks) -> tuple[float, float]:
    """Median processor time and wall time of a call, in s, whether it answers or not."""
    cpu_s, wall_s = [], []
    for _ in range(COST_CALLS):
        start_cpu_s, start_s = clocks.cpu_s(), clocks.now()
        with contextlib.suppress(ReadError):  # counted when polled
            read(device, call)
        wall_s.append(clocks.now() - start_s)
        cpu_s.append(clocks.cpu_s() - start_cpu_s)
    return statistics.median(cpu_s), statistics.median(wall_s)


def _poll(device: Device, wall_s: Mapping[str, float], seconds: float, clocks: Clocks) -> dict[str, _Look]:
    start_s = clocks.now()
    looks = {call: _Look(max(POLL_PERIOD_S, cost_s / MAX_DUTY), start_s) for call, cost_s in wall_s.items()}
    while looks and (now_s := clocks.now()) < start_s + seconds:
        call, look = min(looks.items(), key=lambda item: item[1].due_s)
        if look.due_s > now_s:
            clocks.sleep(max(look.due_s - now_s, 1e-5))
            continue
        look.due_s = now_s + look.every_s
        try:
            answer = read(device, call)
        except ReadError as error:
            look.failures += 1
            look.last_failure = error.reason
            continue
        value: Any = answer
        if isinstance(answer, PowerSamples):
            value = answer.samples[-1] if answer.samples else math.nan
        if isinstance(value, float) and not math.isfinite(value):
            look.failures += 1
            look.last_failure = f"not a finite number: {value}"
        else:
            look.add(now_s, clocks.now(), value)
    return looks


def _describe_call(call: str, result: Probe, cost: tuple[float, float] | None, look: _Look | None) -> dict[str, Any]:
    described: dict[str, Any] = {"status": result.status, "reason": result.reason}
    value = look.values[-1][1] if call == "power_samples_w" and look and look.values else result.value
    described |= _finite("value", value, str(result)) | {"unit": _UNITS[call.rpartition("_")[2]]}
    if cost is None or look is None:
        described |= {"cpu_s": None, "wall_s": None, "update_period_s": None}
        return described | {"update_period_s_null_reason": str(result)}
    described |= {"cpu_s": cost[0], "wall_s": cost[1], "poll_period_s": look.apart_s, "failures": look.failures}
    described |= {"last_failure": look.last_failure} | _update_period(look)
    return described | (_resolution(look) if call == "total_energy_j" else {})


def _update_period(look: _Look) -> dict[str, Any]:
    """How often the value changes: the mean of the distances that lie within one look of their median.

    The median alone would be a whole number of looks. A value that is renewed without a change is not seen to be.
    """
    apart_s, changes = look.apart_s, len(look.changes_s)
    described: dict[str, Any] = {"changes": changes, "update_period_s": None}
    if apart_s is None:
        return described | {"update_period_s_null_reason": "too few readings"}
    if changes == 0:
        return described | {"update_period_s_null_reason": NEVER}
    if changes == 1:
        return described | {"update_period_s_null_reason": "changed once during the probe"}
    distances_s = np.diff(look.changes_s)
    near = np.abs(distances_s - np.median(distances_s)) <= apart_s
    period_s = float(np.mean(distances_s[near])) if near.any() else float(np.median(distances_s))
    # Seen changed at nearly every look, it may change any number of times in between.
    return described | {"update_period_s": period_s, "update_period_is_at_most": period_s < 2 * apart_s}


def _resolution(look: _Look) -> dict[str, Any]:
    """The largest number of whole mJ of which every increment of the counter is a multiple: it is not coarser."""
    increments_mj = (
        [round(step * 1e3) for step in np.diff([look.values[0], *look.change_values])] if look.values else []
    )
    if any(step < 0 for step in increments_mj):
        return {"resolution_j": None, "resolution_j_null_reason": "the counter went backwards"}
    if len(increments_mj) < MIN_INCREMENTS:
        reason = f"{len(increments_mj)} increments seen, {MIN_INCREMENTS} are needed"
        return {"resolution_j": None, "resolution_j_null_reason": reason}
    return {
        "resolution_j": math.gcd(*increments_mj) * 1e-3,
        "median_increment_j": statistics.median(increments_mj) * 1e-3,
    }


def _min_step(source: str | None, calls: Mapping[str, Any]) -> dict[str, Any]:
    """How long a step must be for its bound to stay below `MAX_RELATIVE_BOUND` of its energy, roughly.

    `CounterCurve` bounds each end of a window by (P_hi - P_lo) * tau / 4 + u * P_hi at most (tau the tick, u how well
    its time is known). For a power P that swings by no more than P, so that P_hi <= 1.5 P, both ends make
    P * (tau / 2 + 3 u). Here u is half the time between two looks of this probe. Where the device keeps samples of
    power, the bound is at least `SampleCurve.IN_STEP` of the energy, and P times the samples' distance more.
    """
    counter = calls["total_energy_j"]
    if source != "nvml_total_energy":
        reason = "derived for the total-energy counter only"
    elif counter["update_period_s"] is None:
        reason = f"the tick of the counter is not known: {counter['update_period_s_null_reason']}"
    else:
        both_ends_s = counter["update_period_s"] / 2 + 3 * counter["poll_period_s"] / 2
        by_counter_s, apart_s = both_ends_s / MAX_RELATIVE_BOUND, calls["power_samples_w"]["update_period_s"]
        if apart_s is None:
            return {"min_step_s": by_counter_s}
        return {"min_step_s": min(by_counter_s, apart_s / (MAX_RELATIVE_BOUND - SampleCurve.IN_STEP))}
    return {"min_step_s": None, "min_step_s_null_reason": reason}


def _throttling(result: Probe, look: _Look | None) -> dict[str, Any]:
    """The reasons whose seconds are not zero: since the counters' origin, and during the probe."""
    if look is None or not look.values:
        reason = str(result) if look is None else look.last_failure
        return {"throttling": None, "throttling_null_reason": reason}
    first, last = look.values[0], look.values[-1]
    reasons = {
        reason: {"total_s": total_s, "during_probe_s": total_s - first[reason] if reason in first else None}
        for reason, total_s in last.items()
        if total_s != 0
    }
    return {"throttling": reasons}


def _compare(looks: Mapping[str, _Look], others: list[Any] | None) -> dict[str, Any]:
    """The counter against the integral of instantaneous power, from the first tick that was seen to the last."""
    counter, power = looks.get("total_energy_j"), looks.get("power_instant_w")
    reason = None
    if counter is None or power is None:
        reason = "needs the total-energy counter and instantaneous power"
    elif len(counter.changes_s) < 2 or len(power.times_s) < 2:
        reason = "the counter ticked less than twice during the probe"
    elif counter.change_values[-1] < counter.change_values[0]:
        reason = "the counter went backwards"
    elif power.times_s[0] > counter.changes_s[0] or power.times_s[-1] < counter.changes_s[-1]:
        reason = "instantaneous power was not read all the time"
    if reason is not None or counter is None or power is None:
        return {"difference_percent": None, "difference_percent_null_reason": reason}
    start_s, end_s = counter.changes_s[0], counter.changes_s[-1]
    inside_s = [time_s for time_s in power.times_s if start_s < time_s < end_s]
    times_s = np.array([start_s, *inside_s, end_s])
    integral_j = float(np.trapezoid(np.interp(times_s, power.times_s, power.values), times_s))
    counter_j = counter.change_values[-1] - counter.change_values[0]
    use = "load unknown" if others is None else "idle" if not others else f"{len(others)} other process(es) on it"
    return {
        "counter_j": counter_j,
        "power_integral_j": integral_j,
        "time_s": end_s - start_s,
        "difference_percent": (integral_j / counter_j - 1) * 100,
        "label": f"{use}, {end_s - start_s:.1f} s: coarse",
    }


def _diagnose_rail(rail: Rail) -> dict[str, Any]:
    described: dict[str, Any] = {"name": rail.name, "scope": rail.scope, "kind": rail.kind, "status": "supported"}
    unit = "J" if rail.kind == "energy" else "W"
    try:
        return described | {"reason": None, "value": rail.read(), "unit": unit, "range_j": rail.range_j}
    except ReadError as error:
        status = "not_supported" if isinstance(error, NotSupported) else "failed"
        return described | {
            "status": status,
            "reason": error.reason,
            "value": None,
            "unit": unit,
            "range_j": rail.range_j,
        }


def _finite(key: str, value: Any, reason: str) -> dict[str, Any]:
    """A value that JSON can hold, or None with the reason."""
    if value is None:
        return {key: None, f"{key}_null_reason": reason}
    numbers = list(value.values()) if isinstance(value, dict) else [value]
    if not all(map(math.isfinite, numbers)):
        return {key: None, f"{key}_null_reason": f"not a finite number: {value}"}
    return {key: value}
