"""Parameters of simulated GPUs: electrical, thermal, of the clock controller, and of the instruments.

Each number has its source beside it. "FACTS" is a measurement or a public report in the project's notes; "derived"
follows from such numbers and the model; everything marked "assumed" is a plausible guess. Nothing here is fitted to
a device (the calibrated profiles are in `jaxchunk.simulation.devices`), and no figure computed from a profile is a
measurement.
"""

import math
from dataclasses import dataclass
from typing import Literal

from jaxchunk.errors import InputError

Kind = Literal["compute", "memory", "idle"]


@dataclass(frozen=True)
class WorkProfile:
    """How one kind of work draws power and depends on the clock.

    `dynamic_w` is what it draws beyond idle at the reference clock with random data. It progresses at the rate
    `(1 - clock_sensitivity) + clock_sensitivity * clock / reference clock`.
    """

    dynamic_w: float
    clock_sensitivity: float


@dataclass(frozen=True)
class ThermalProfile:
    """One heat capacity behind one resistance: C dT/dt = P - (T - ambient) / R, with C = time_constant_s / R."""

    resistance_c_per_w: float
    time_constant_s: float


@dataclass(frozen=True)
class ControllerProfile:
    """The controller that sets the clock once every `period_s`.

    It compares the power averaged over the last `averaging_s` with the limit, and the temperature with
    `throttle_c`. Above either it goes down by `gain` times the excess, rounded up to whole clock steps, at most
    `max_down_mhz`; with more room than the margin below both it goes up by `up_mhz`; else it holds. Without a limit
    (None) power alone never lowers the clock.

    Where `peak_limit_w` is given, a brake watches power averaged over `peak_averaging_s` all the time: above the
    limit it takes `brake_fraction` off the clock at once, then waits for `brake_holdoff_s` before it looks again. The
    way back is the controller's: `up_mhz` a period. With `peak_counts_events` it watches an estimate that counts what
    the units do and does not see operands: zeros look to it as random data do.

    The clock under load stays `droop_mhz_per_w` below the maximum for every watt beyond idle, for no reported reason.
    """

    period_s: float
    averaging_s: float
    power_limit_w: float | None
    power_margin_w: float
    power_gain_mhz_per_w: float
    throttle_c: float
    thermal_margin_c: float
    thermal_gain_mhz_per_c: float
    up_mhz: float
    max_down_mhz: float
    droop_mhz_per_w: float = 0.0
    peak_limit_w: float | None = None
    peak_averaging_s: float = 0.003
    brake_fraction: float = 0.2
    brake_holdoff_s: float = 0.01
    peak_counts_events: bool = False


@dataclass(frozen=True)
class InstrumentProfile:
    """How the device lets itself be read.

    The energy counter moves every `tick_s`. Instantaneous power is the mean over `instant_averaging_s` (0: power at
    that instant), renewed every `renewal_s` (0: always fresh). Averaged power is the mean over the last
    `averaging_s`. The device keeps `samples_kept` samples of power, one every `samples_every_s` (None: none). A read of
    the counter takes `energy_call_s`. The calls in `not_supported` say so.
    """

    tick_s: float
    renewal_s: float
    instant_averaging_s: float
    averaging_s: float = 1.0
    energy_call_s: float = 0.0
    samples_every_s: float | None = None
    samples_kept: int = 119
    not_supported: frozenset[str] = frozenset()


@dataclass(frozen=True)
class GpuProfile:
    """A simulated GPU.

    Power is `idle_w + leakage_w_per_c * (T - idle_temperature_c)` plus, by phase,
    `dynamic_w * activity * (V(f) / V_ref)**2 * f / f_ref`. The voltage is linear in the clock above a floor:
    `V(f) / V_ref = max(voltage_floor, 1 + voltage_slope * (f / f_ref - 1))`. Drawn power follows with a first-order
    lag of `electrical_lag_s` (0: none). Each phase's activity varies at random by `activity_noise` (relative
    standard deviation).

    Raises:
      InputError: a parameter is out of range.
    """

    name: str
    idle_w: float
    idle_temperature_c: float
    leakage_w_per_c: float
    compute: WorkProfile
    memory: WorkProfile
    zeros_activity: float  # activity of work on operands that are all zero; 1 is random data
    reference_clock_mhz: float
    min_clock_mhz: float
    max_clock_mhz: float
    voltage_slope: float
    voltage_floor: float
    thermal: ThermalProfile
    controller: ControllerProfile
    instruments: InstrumentProfile
    clock_step_mhz: float = 15.0
    electrical_lag_s: float = 0.0
    activity_noise: float = 0.0

    def __post_init__(self) -> None:
        """Checks what the integration relies on."""
        positive = {
            "min_clock_mhz": self.min_clock_mhz,
            "reference_clock_mhz": self.reference_clock_mhz,
            "clock_step_mhz": self.clock_step_mhz,
            "idle_w": self.idle_w,
            "controller.period_s": self.controller.period_s,
            "controller.averaging_s": self.controller.averaging_s,
            "controller.peak_averaging_s": self.controller.peak_averaging_s,
            "thermal.resistance_c_per_w": self.thermal.resistance_c_per_w,
            "thermal.time_constant_s": self.thermal.time_constant_s,
            "instruments.tick_s": self.instruments.tick_s,
            "instruments.averaging_s": self.instruments.averaging_s,
        }
        for label, value in positive.items():
            if not 0 < value < math.inf:
                raise InputError(f"profile {self.name}: {label} is {value}, needed is a positive number")
        if self.min_clock_mhz > self.max_clock_mhz:
            raise InputError(
                f"profile {self.name}: min_clock_mhz is {self.min_clock_mhz}, needed is at most max_clock_mhz, "
                f"{self.max_clock_mhz}"
            )
        for work in (self.compute, self.memory):
            if not 0 <= work.clock_sensitivity <= 1:
                raise InputError(
                    f"profile {self.name}: clock_sensitivity is {work.clock_sensitivity}, needed is 0 to 1"
                )
        if self.leakage_w_per_c * self.thermal.resistance_c_per_w >= 1:
            raise InputError(
                f"profile {self.name}: leakage_w_per_c is {self.leakage_w_per_c}, needed is less than "
                f"{1 / self.thermal.resistance_c_per_w:.3g} (1 / thermal resistance): the temperature would run away"
            )

    def idle_power_w(self, temperature_c: float) -> float:
        """Power without work, in W."""
        return self.idle_w + self.leakage_w_per_c * (temperature_c - self.idle_temperature_c)

    def dynamic_power_w(self, kind: Kind, clock_mhz: float, activity: float = 1.0) -> float:
        """Power of a kind of work beyond idle, in W."""
        if kind == "idle":
            return 0.0
        work = self.compute if kind == "compute" else self.memory
        ratio = clock_mhz / self.reference_clock_mhz
        voltage = max(self.voltage_floor, 1.0 + self.voltage_slope * (ratio - 1.0))
        return work.dynamic_w * activity * voltage**2 * ratio

    def progress_rate(self, kind: Kind, clock_mhz: float) -> float:
        """Seconds of work at the reference clock that are done in one second."""
        if kind == "idle":
            return 1.0
        work = self.compute if kind == "compute" else self.memory
        return 1.0 - work.clock_sensitivity * (1.0 - clock_mhz / self.reference_clock_mhz)

    def idle_steady_c(self, ambient_c: float) -> float:
        """The temperature at which an idle device stays, in degrees Celsius."""
        resistance = self.thermal.resistance_c_per_w
        at_zero_w = self.idle_power_w(0.0)
        return (ambient_c + resistance * at_zero_w) / (1.0 - resistance * self.leakage_w_per_c)


H200 = GpuProfile(
    name="H200",
    idle_w=120.0,  # FACTS
    idle_temperature_c=35.0,  # assumed
    leakage_w_per_c=0.4,  # assumed
    # Derived: about 690 W on average at 1580 MHz (FACTS) over 51 ms of GEMMs and 7 ms of softmax.
    compute=WorkProfile(dynamic_w=590.0, clock_sensitivity=1.0),
    memory=WorkProfile(dynamic_w=330.0, clock_sensitivity=0.1),  # both assumed
    zeros_activity=0.5,  # derived: 490-560 W at 1830-1890 MHz (FACTS)
    reference_clock_mhz=1580.0,  # FACTS: the clock with random data
    min_clock_mhz=345.0,  # assumed
    max_clock_mhz=1980.0,  # FACTS
    voltage_slope=0.5,  # assumed
    voltage_floor=0.75,  # assumed
    thermal=ThermalProfile(resistance_c_per_w=0.055, time_constant_s=15.0),  # assumed
    controller=ControllerProfile(
        period_s=0.02,  # assumed
        averaging_s=0.05,  # assumed
        power_limit_w=700.0,  # FACTS
        power_margin_w=15.0,  # assumed: a little more than one clock step
        power_gain_mhz_per_w=0.5,  # assumed
        throttle_c=87.0,  # assumed
        thermal_margin_c=1.0,  # assumed
        thermal_gain_mhz_per_c=15.0,  # assumed
        up_mhz=15.0,  # assumed
        max_down_mhz=150.0,  # assumed
        droop_mhz_per_w=0.3,  # derived: 1830-1890 MHz with zeros, below the power cap and below 1980 MHz (FACTS)
    ),
    instruments=InstrumentProfile(
        tick_s=0.1,  # FACTS
        renewal_s=0.1,  # measured on the H200 of FACTS
        instant_averaging_s=0.025,  # assumed: the samples buffer holds one every 20-25 ms (FACTS)
        energy_call_s=0.0032,  # measured on the H200 of FACTS; up to 0.0075
        samples_every_s=0.02,  # likewise, as is how many it keeps
    ),
    electrical_lag_s=0.001,  # assumed
    activity_noise=0.01,  # assumed
)

L40S = GpuProfile(
    name="L40S",
    idle_w=85.0,  # assumed (clocks up, no work)
    idle_temperature_c=35.0,  # assumed
    leakage_w_per_c=0.2,  # assumed
    # Derived: at the 350 W cap with random data (FACTS: 344.8-349.5 W), 764 ms of GEMMs and 32 ms of softmax.
    compute=WorkProfile(dynamic_w=252.0, clock_sensitivity=1.0),
    memory=WorkProfile(dynamic_w=150.0, clock_sensitivity=0.1),  # both assumed
    zeros_activity=0.44,  # derived: 267-269 W (FACTS), at the maximum clock
    reference_clock_mhz=1980.0,  # derived: 796 ms with random data, 631 ms with zeros (FACTS), those at 2520 MHz
    min_clock_mhz=210.0,  # assumed
    max_clock_mhz=2520.0,  # the vendor's boost clock
    voltage_slope=0.5,  # assumed
    voltage_floor=0.75,  # assumed
    thermal=ThermalProfile(resistance_c_per_w=0.13, time_constant_s=25.0),  # assumed
    controller=ControllerProfile(
        period_s=0.05,  # assumed
        averaging_s=0.1,  # assumed
        power_limit_w=350.0,  # FACTS
        power_margin_w=6.0,  # assumed
        power_gain_mhz_per_w=1.0,  # assumed
        throttle_c=88.0,  # assumed
        thermal_margin_c=1.0,  # assumed
        thermal_gain_mhz_per_c=15.0,  # assumed
        up_mhz=15.0,  # assumed
        max_down_mhz=150.0,  # assumed
    ),
    instruments=InstrumentProfile(  # assumed: as the H200
        tick_s=0.1, renewal_s=0.1, instant_averaging_s=0.025, samples_every_s=0.02
    ),
    electrical_lag_s=0.002,  # assumed
    activity_noise=0.01,  # assumed
)

GB10 = GpuProfile(
    name="GB10",
    idle_w=10.0,  # assumed
    idle_temperature_c=40.0,  # assumed
    leakage_w_per_c=0.05,  # assumed
    compute=WorkProfile(dynamic_w=71.0, clock_sensitivity=1.0),  # derived: the GPU rail reaches about 84 W (FACTS)
    memory=WorkProfile(dynamic_w=35.0, clock_sensitivity=0.1),  # both assumed
    zeros_activity=0.6,  # assumed
    reference_clock_mhz=2400.0,  # assumed
    min_clock_mhz=210.0,  # assumed
    max_clock_mhz=2400.0,  # assumed
    voltage_slope=0.5,  # assumed
    voltage_floor=0.75,  # assumed
    # Assumed, so that 84 W cannot last and the limit is thermal (FACTS: SW thermal 173 s, SW power cap 0).
    thermal=ThermalProfile(resistance_c_per_w=0.85, time_constant_s=40.0),
    controller=ControllerProfile(
        period_s=0.1,  # assumed
        averaging_s=0.2,  # assumed
        power_limit_w=None,  # FACTS: no limit can be read, and SW power cap never accrued
        power_margin_w=0.0,
        power_gain_mhz_per_w=0.0,
        throttle_c=83.0,  # assumed
        thermal_margin_c=1.0,  # assumed
        thermal_gain_mhz_per_c=30.0,  # assumed
        up_mhz=15.0,  # assumed
        max_down_mhz=150.0,  # assumed
    ),
    instruments=InstrumentProfile(
        tick_s=0.1,  # assumed: that the counter works is FACTS, its tick is not known
        renewal_s=0.1,  # assumed
        instant_averaging_s=0.025,  # assumed
        samples_every_s=None,  # not known
        not_supported=frozenset({"power_limit_w"}),  # FACTS
    ),
    electrical_lag_s=0.002,  # assumed
    activity_noise=0.01,  # assumed
)
