"""The measuring protocol against work whose cost is known, in simulated time."""

import collections
import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.measuring import protocol as protocol_module
from jaxchunk.measuring.protocol import Conditions, Protocol, Variant, measure, settle
from jaxchunk.measuring.statistics import bootstrap_median, interval_of, ratio_of, ratio_of_best, ratios
from jaxchunk.telemetry import Monitor, Window
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice
from jaxchunk.telemetry.window import summed

PLAIN = Protocol(repeats=6, window_s=1.0, warmup_calls=2, temperature_tolerance_c=None)


class Immediate:
    """A completion watcher for work that is done when it is dispatched."""

    def __init__(self, now):
        self._now, self._ends_s = now, {}

    def watch(self, key, arrays):
        self._ends_s[key] = self._now()

    def wait(self, key):
        return self._ends_s.pop(key)

    def close(self):
        pass


@pytest.fixture(autouse=True)
def immediate(monkeypatch):
    monkeypatch.setattr(protocol_module, "CompletionWatcher", Immediate)


class Rig:
    """A GPU that warms up by 1 °C a second of work and cools as fast, in simulated time."""

    def __init__(self, monkeypatch, *, watched=True, temperature_c=40.0):
        self.clock, self.log, self.temperature_c = ManualClock(), [], temperature_c
        device = SimulatedDevice(Constant(500.0), self.clock) if watched else None
        self.device = device
        if device is not None:
            device.temperature_c = lambda: float(int(self.temperature_c))
        self.monitor = Monitor(device, reason_if_none="no GPU", now=self.clock, cpu_time=lambda: 0.0)
        monkeypatch.setattr(protocol_module.time, "sleep", lambda seconds: self.pass_time(seconds, -1.0))
        monkeypatch.setattr(self.monitor, "wait_ready", lambda end_s, timeout_s: self.pass_time(0.3, 0.0))
        self.pass_time(1.0, 0.0)

    def pass_time(self, seconds, warming_c_per_s):
        end_s = self.clock() + seconds
        while self.clock() < end_s - 1e-9:
            wait_s = self.monitor.sampler.poll_once() if self.monitor.sampler else seconds
            step_s = min(max(wait_s, 1e-3), end_s - self.clock())
            self.clock.advance(step_s)
            self.temperature_c = max(self.temperature_c + warming_c_per_s * step_s, 30.0)
        return True

    def variant(self, name, seconds, *, warming=1.0):
        def call():
            self.log.append(name)
            self.pass_time(seconds, warming)
            return jnp.zeros(())

        return Variant(name, call, factors={"name": name})

    def run(self, variants, protocol, **options):
        conditions = settle(variants, self.monitor, protocol)
        return list(measure(variants, self.monitor, protocol, conditions, **options)), conditions


@pytest.fixture
def blind(monkeypatch):
    return Rig(monkeypatch, watched=False)


@pytest.fixture
def rig(monkeypatch):
    return Rig(monkeypatch)


def two(rig):
    return [rig.variant("slow", 0.2), rig.variant("fast", 0.1)]


def test_every_variant_is_measured_in_every_repeat_for_the_window(blind):
    measurements, _ = blind.run(two(blind), PLAIN)
    assert collections.Counter((m.variant, m.repeat) for m in measurements) == collections.Counter(
        (name, repeat) for name in ("slow", "fast") for repeat in range(6)
    )
    for m in measurements:
        assert m.time_s == pytest.approx({"slow": 0.2, "fast": 0.1}[m.variant])
        assert m.calls * m.time_s >= 1.0 - 1e-9
        assert (m.energy_j, m.energy_null_reason) == (None, "no GPU")
        assert m.sampler_cpu_share is None
        assert m.call_ends_s == pytest.approx([m.time_s * (i + 1) for i in range(m.calls)], abs=2e-5)
        assert m.factors == {"name": m.variant}


def test_warm_up_calls_come_before_each_window_and_do_not_count(blind):
    measurements, _ = blind.run([blind.variant("only", 0.1)], dataclasses.replace(PLAIN, repeats=1, calls=5))
    assert measurements[0].calls == 5 and len(blind.log) == 2 + 5
    assert measurements[0].end_s - measurements[0].start_s == pytest.approx(0.5)


def test_the_order_is_shuffled_within_repeats_and_settled_by_the_seed(blind):
    orders = [tuple(m.variant for m in blind.run(two(blind), dataclasses.replace(PLAIN, seed=3))[0]) for _ in range(2)]
    assert orders[0] == orders[1]
    pairs = {orders[0][i : i + 2] for i in range(0, 12, 2)}
    assert pairs == {("slow", "fast"), ("fast", "slow")}


def test_a_run_that_goes_on_measures_what_is_missing_in_the_order_that_it_had(blind):
    whole, conditions = blind.run(two(blind), PLAIN)
    rest = list(measure(two(blind), blind.monitor, PLAIN, conditions, done=whole[:5]))
    assert [(m.variant, m.repeat) for m in rest] == [(m.variant, m.repeat) for m in whole[5:]]


def test_joules_of_a_window(rig):
    measurements, _ = rig.run(two(rig), dataclasses.replace(PLAIN, repeats=2, window_s=3.0))
    for m in measurements:
        assert m.energy_j == pytest.approx(500.0 * m.time_s, rel=0.02)
        assert m.power_w_std == pytest.approx(0.0, abs=1e-6) and m.sm_clock_mhz_std == 0.0
        assert abs(m.cross_check.disagreement) < 0.02
        assert m.invalid_reason is None and m.slow_without_reason == 0.0
        assert m.sampler_cpu_share == 0.0


def test_windows_start_at_the_common_temperature(rig):
    """Whatever ran before, and however the variant itself warms the device."""
    cold, hot = rig.variant("cold", 0.1, warming=-0.5), rig.variant("hot", 0.1, warming=0.4)
    protocol = Protocol(repeats=4, window_s=4.0, warmup_calls=0, temperature_tolerance_c=2.0, settle_s=30.0)
    conditions = Conditions({"cold": 40, "hot": 40}, "hot", 60.0, 0.0)
    measurements = list(measure([cold, hot], rig.monitor, protocol, conditions))
    starts_c = [m.start_temperature_c for m in measurements[1:]]
    assert max(starts_c) - min(starts_c) <= 4.0 and 58.0 <= min(starts_c) <= max(starts_c) <= 62.0
    ends_c = [m.temperature_c for m in measurements]
    assert max(ends_c) - min(ends_c) > 2.0  # so that starts alike had to be brought about


def test_settling_heats_until_steady_and_finds_the_hungriest(rig, monkeypatch):
    draws = {"modest": 300.0, "hungry": 650.0}

    def variant(name):
        def call():
            monkeypatch.setattr(rig.device, "power_instant_w", lambda: draws[name])
            rig.pass_time(0.1, 2.0 if rig.temperature_c < 55 else 0.0)
            return jnp.zeros(())

        return Variant(name, call)

    monkeypatch.setattr(rig.device, "total_energy_j", lambda: 1.0)  # stands still: power comes from the samples
    protocol = Protocol(temperature_tolerance_c=2.0, settle_s=30.0)
    conditions = settle([variant("modest"), variant("hungry")], rig.monitor, protocol)
    assert conditions.heater == "hungry"
    assert conditions.start_temperature_c == pytest.approx(54.0, abs=1.01)


def test_a_device_that_is_too_hot_is_let_cool(monkeypatch):
    rig = Rig(monkeypatch, temperature_c=80.0)
    protocol = Protocol(repeats=1, calls=3, settle_s=60.0)
    (measured,) = measure([rig.variant("a", 0.1)], rig.monitor, protocol, Conditions({"a": 3}, "a", 60.0, None))
    assert measured.start_temperature_c <= 62.0 and len(rig.log) == 2 + 3


class StoppedError(Exception):
    pass


def stop_at(rig, at_s):
    def check():
        if rig.clock() >= at_s:
            raise StoppedError

    return check


def test_a_stop_does_not_wait_for_a_device_to_cool(monkeypatch):
    rig = Rig(monkeypatch, temperature_c=80.0)
    protocol, conditions = Protocol(repeats=1, calls=3, settle_s=60.0), Conditions({"a": 3}, "a", 60.0, None)
    at_s = rig.clock() + 5.0
    with pytest.raises(StoppedError):
        list(measure([rig.variant("a", 0.1)], rig.monitor, protocol, conditions, check=stop_at(rig, at_s)))
    assert rig.log == [] and rig.clock() == pytest.approx(at_s, abs=0.2)


def test_a_stop_does_not_wait_for_a_window_to_end(blind):
    protocol, conditions = Protocol(repeats=1, calls=50), Conditions({"a": 50}, "a", None, None)
    at_s = blind.clock() + 3.0
    with pytest.raises(StoppedError):
        list(measure([blind.variant("a", 0.1)], blind.monitor, protocol, conditions, check=stop_at(blind, at_s)))
    assert 20 < len(blind.log) < 32 and blind.clock() == pytest.approx(at_s, abs=0.2)


def test_a_stop_does_not_wait_for_conditions_to_be_settled(rig):
    at_s = rig.clock() + 3.0
    with pytest.raises(StoppedError):
        settle([rig.variant("a", 0.1)], rig.monitor, Protocol(settle_s=60.0), check=stop_at(rig, at_s))
    assert rig.clock() == pytest.approx(at_s, abs=0.2)


def test_a_temperature_out_of_reach_does_not_hold_up_the_run_for_ever(rig):
    protocol = Protocol(repeats=1, calls=3, settle_s=5.0)
    start_s = rig.clock()
    measured = list(
        measure([rig.variant("a", 0.1, warming=0.0)], rig.monitor, protocol, Conditions({"a": 3}, "a", 99.0, None))
    )
    assert rig.clock() - start_s < 13.0  # twice the time before the first window
    assert measured[0].start_temperature_c == 40.0


def test_a_run_that_goes_on_waits_for_the_first_temperature_and_heats_up(monkeypatch):
    """The device has become cold, and at first the sampler has nothing to say."""
    rig = Rig(monkeypatch)
    monitor = Monitor(rig.device, now=rig.clock, cpu_time=lambda: 0.0)
    rig.monitor = monitor
    monkeypatch.setattr(monitor, "wait_ready", lambda end_s, timeout_s: True)
    protocol = Protocol(repeats=1, calls=3, settle_s=8.0)  # 20 °C are missing, and only 8 s would not do
    conditions = Conditions({"a": 3}, "a", 55.0, None)
    (measured,) = measure([rig.variant("a", 0.1)], monitor, protocol, conditions)
    assert 53.0 <= measured.start_temperature_c <= 57.0


def test_a_slow_call_beforehand_does_not_shorten_the_window(blind):
    times_s = [3.0, 0.5, 0.125]

    def call():
        blind.pass_time(times_s.pop(0) if len(times_s) > 1 else times_s[0], 0.0)
        return jnp.zeros(())

    assert settle([Variant("a", call)], blind.monitor, PLAIN).calls == {"a": 8}


def test_variants_may_be_given_as_many_calls(blind):
    conditions = settle(two(blind), blind.monitor, dataclasses.replace(PLAIN, same_calls=True))
    assert conditions.calls == {"slow": 10, "fast": 10}


def test_shares_of_several_devices_are_shares():
    """Their throttle seconds are added up."""
    nothing = dict.fromkeys(("energy_j", "energy_bound_j", "energy_source", "power_w", "sm_clock_mhz", "temperature_c"))
    part = Window(
        0.0, 2.0, energy_null_reason="no", throttle={"sw_power_cap": 1.0}, slow_without_reason_s=2.0, **nothing
    )
    for window in (part, summed([part, part])):
        assert protocol_module._shares(window) == {"sw_power_cap": 0.5}
        assert protocol_module._share(window, window.slow_without_reason_s) == 1.0


def test_of_one_sample_there_is_no_ripple():
    assert protocol_module._std(np.array([500.0])) is None
    assert protocol_module._std(np.array([500.0, np.nan])) is None
    assert protocol_module._std(np.array([400.0, 600.0])) == 100.0


def test_a_window_with_a_stall_is_measured_again(rig, monkeypatch):
    """And where it stalls again it is kept, marked, and averaged nowhere."""
    stalls = [2.0, 0.0, 2.0, 2.0]

    def call():
        rig.pass_time(0.5, 0.0)
        rig.clock.advance(stalls.pop(0) if stalls else 0.0)
        rig.pass_time(0.5, 0.0)
        return jnp.zeros(())

    protocol = Protocol(repeats=2, calls=1, warmup_calls=0, temperature_tolerance_c=None)
    conditions = Conditions({"a": 1}, "a", None, None)
    good, bad = measure([Variant("a", call)], rig.monitor, protocol, conditions)
    assert good.invalid_reason is None and good.time_s == pytest.approx(1.0)
    assert bad.invalid_reason.startswith("no sample for 2.0") and stalls == []
    assert interval_of([good, bad], "a").median == pytest.approx(1.0)


def test_records_survive_json(rig):
    (measured,), _ = rig.run([rig.variant("a", 0.1)], Protocol(repeats=1, calls=4, temperature_tolerance_c=None))
    record = json.loads(json.dumps(dataclasses.asdict(measured)))
    again = protocol_module.Measurement(**record)
    assert dataclasses.asdict(again) == dataclasses.asdict(measured)


def test_ratios_are_formed_repeat_by_repeat(blind):
    measurements, _ = blind.run(two(blind), PLAIN)
    assert ratios(measurements, "slow", "fast") == pytest.approx([2.0] * 6)
    assert ratios(measurements, "slow", "fast", "energy_j") == []
    assert ratios(measurements, "slow", "absent") == []
    assert ratio_of(measurements, "slow", "fast").excludes_one
    assert ratio_of(measurements, "slow", "absent") is None


def test_a_ripple_of_nothing_has_no_ratio(rig):
    measurements, _ = rig.run(two(rig), dataclasses.replace(PLAIN, repeats=2, window_s=3.0))
    assert ratios(measurements, "slow", "fast", "sm_clock_mhz_std") == []  # the simulated clock stands still
    assert ratio_of(measurements, "slow", "fast", "sm_clock_mhz_std") is None


def test_the_best_of_several_is_judged_without_the_luck_of_being_picked():
    """Every variant is low in one repeat: each repeat's lowest is below 1, what the other repeats pick is not."""

    def measurement(name, repeat, time_s):
        unknown = dict.fromkeys(("energy_source", "energy_null_reason", "power_w", "power_w_std", "throttle"))
        return protocol_module.Measurement(
            name,
            repeat,
            1,
            time_s,
            energy_j=None,
            energy_bound_j=None,
            sm_clock_mhz=None,
            temperature_c=None,
            **unknown,
        )

    base = [measurement("base", r, 1.0) for r in range(5)]
    lucky = [measurement(str(v), r, 0.9 if r == v else 1.0 + 0.01 * v) for v in range(5) for r in range(5)]
    assert ratio_of_best(base + lucky, "01234", "base").high >= 1.0
    fast = [measurement("fast", r, 0.8 + 0.001 * r) for r in range(5)]
    assert ratio_of_best(base + lucky + fast, [*"01234", "fast"], "base") == ratio_of(base + fast, "fast", "base")
    assert ratio_of_best([base[0], fast[0]], ["fast"], "base") is None


def test_bootstrap_interval_holds_the_median_and_shrinks():
    wide = bootstrap_median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert wide.median == 3.0
    assert 1.0 <= wide.low < 3.0 < wide.high <= 5.0
    narrow = bootstrap_median([1.0, 2.0, 3.0, 4.0, 5.0] * 40)
    assert narrow.high - narrow.low < wide.high - wide.low
    assert bootstrap_median([7.0]) == (7.0, 7.0, 7.0)
