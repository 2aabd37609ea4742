"""What readings add up to, beside the energy; nonsense, clocks that go backwards, and files that are gone on with."""

import csv
import math

import numpy as np
import pytest

from jaxchunk.telemetry import Monitor, ReadFailed
from jaxchunk.telemetry.curve import CumulativeCurve
from jaxchunk.telemetry.device import Probe
from jaxchunk.telemetry.energy import CounterCurve
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.samples import CSV_COLUMNS, SampleFile
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, SquareWave, drive
from jaxchunk.telemetry.tracks import RailKind, Tracks


def rig(profile=None, monitor_options=None, **device_options):
    clock = ManualClock()
    device = SimulatedDevice(profile or Constant(500.0), clock, **device_options)
    return clock, device, Monitor(device, now=clock, **(monitor_options or {}))


class FakeRail:
    """A rail whose answer is what `answer` returns."""

    def __init__(self, name, kind, answer):
        self.name, self.kind, self.read = name, kind, answer


@pytest.mark.parametrize("profile", [Constant(500.0), SquareWave(700.0, 300.0, 0.9)], ids=str)
def test_the_cross_check_agrees_within_the_bounds(profile):
    clock, _, monitor = rig(profile)
    drive(monitor.sampler.poll_once, clock, 10.0)
    window = monitor.window(2.0, 8.0)
    check = window.cross_check
    assert check.source == "nvml_power_instant"
    assert abs(check.energy_j - window.energy_j) <= check.energy_bound_j + window.energy_bound_j
    assert check.disagreement == pytest.approx(check.energy_j / window.energy_j - 1)


@pytest.mark.parametrize("factor", [0.8, 1.25])
def test_the_cross_check_has_a_sign(factor):
    clock, device, monitor = rig()
    power_w = device.power_instant_w
    device.power_instant_w = lambda: factor * power_w()
    drive(monitor.sampler.poll_once, clock, 8.0)
    assert monitor.window(2.0, 7.0).cross_check.disagreement == pytest.approx(factor - 1, abs=0.01)


def test_without_a_counter_there_is_nothing_to_compare():
    clock, _, monitor = rig(failing={"total_energy_j": ReadFailed("absent")})
    drive(monitor.sampler.poll_once, clock, 5.0)
    assert monitor.window(1.0, 4.0).energy_j is not None
    assert monitor.window(1.0, 4.0).cross_check is None


@pytest.mark.parametrize(
    ("clock_mhz", "throttled", "slow_s"),
    [(700.0, 0.0, 5.0), (700.0, 0.9, 0.0), (700.0, 0.01, 5.0), (1500.0, 0.0, 0.0), (1340.0, 0.0, 5.0)],
    ids=["pinned", "throttled", "hardly throttled", "fast", "just below three quarters"],
)
def test_slow_without_a_reason(clock_mhz, throttled, slow_s):
    clock, device, monitor = rig(throttle_rates={"sw_power_cap": 0.0, "sw_thermal": throttled})
    device.sm_clock_mhz = lambda: clock_mhz
    drive(monitor.sampler.poll_once, clock, 8.0)
    assert monitor.window(2.0, 7.0).slow_without_reason_s == pytest.approx(slow_s, abs=0.01)


def test_the_slow_part_of_a_window_is_counted():
    clock, device, monitor = rig()
    device.sm_clock_mhz = lambda: 700.0 if 3.0 < clock() < 5.0 else 1700.0
    drive(monitor.sampler.poll_once, clock, 8.0)
    assert monitor.window(1.0, 7.0).slow_without_reason_s == pytest.approx(2.0, abs=0.5)


def test_throttle_counters_that_move_in_steps_are_a_reason_at_a_windows_edge_too():
    """Every attended edge reads them again, a few milliseconds after the last time: too soon to have moved."""
    clock, device, monitor = rig()
    device.sm_clock_mhz = lambda: 700.0
    device.throttle_s = lambda: {"sw_power_cap": 0.25 * math.floor(clock() / 0.25), "sw_thermal": 0.0}
    while clock() < 10.0:
        monitor.attend()
        drive(monitor.sampler.poll_once, clock, clock() + 0.06)
    assert monitor.window(2.0, 9.0).slow_without_reason_s == 0.0


@pytest.mark.parametrize("missing", ["sm_clock_max_mhz", "throttle_s", "sm_clock_mhz"])
def test_what_is_needed_for_it_and_missing_makes_it_unknown(missing):
    clock, _, monitor = rig(failing={missing: ReadFailed("absent")})
    drive(monitor.sampler.poll_once, clock, 5.0)
    assert monitor.window(1.0, 4.0).slow_without_reason_s is None


def test_a_window_with_a_stall_is_invalid():
    clock, _, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 3.0)
    clock.advance(1.2)
    drive(monitor.sampler.poll_once, clock, 8.0)
    assert monitor.window(2.0, 6.0).invalid_reason.startswith("no sample for 1.2")
    assert monitor.window(3.5, 4.0).invalid_reason is None or monitor.window(3.5, 4.0).energy_j is None
    assert monitor.window(1.0, 2.9).invalid_reason is None
    assert monitor.window(5.0, 7.0).invalid_reason is None


def test_joules_of_the_rails():
    clock = ManualClock()
    names = ("cpu", "energy", lambda: 80.0 * clock()), ("board", "power", lambda: 30.0)
    device = SimulatedDevice(Constant(500.0), clock)
    monitor = Monitor(device, now=clock, rails=[FakeRail(*name) for name in names])
    drive(monitor.sampler.poll_once, clock, 6.0)
    window = monitor.window(1.0, 5.0)
    assert window.rails_j == {"cpu": pytest.approx(320.0), "board": pytest.approx(120.0)}
    assert window.energy_j == pytest.approx(2000.0, rel=0.02)  # they are never added


def test_rails_without_a_device():
    clock = ManualClock()
    monitor = Monitor(None, now=clock, rails=[FakeRail("cpu", "energy", lambda: 80.0 * clock())])
    drive(monitor.sampler.poll_once, clock, 3.0)
    window = monitor.window(1.0, 2.0)
    assert window.rails_j == {"cpu": pytest.approx(80.0)}
    assert window.energy_j is None and window.energy_null_reason == "no device to measure"


def test_a_rail_that_is_there_as_joules_and_as_watts_is_counted_once():
    clock = ManualClock()
    rails = [FakeRail("cpu", "energy", lambda: 80.0 * clock()), FakeRail("cpu", "power", lambda: 80.0)]
    monitor = Monitor(None, now=clock, rails=rails)
    drive(monitor.sampler.poll_once, clock, 3.0)
    assert monitor.window(1.0, 2.0).rails_j == {"cpu": pytest.approx(80.0)}


@pytest.mark.parametrize("error", [ReadFailed("busy"), OSError("gone"), ValueError("odd"), ZeroDivisionError()])
def test_a_rail_that_fails_is_counted_and_ends_nothing(error):
    clock = ManualClock()

    def answer():
        if clock() > 2.0:
            raise error
        return 80.0 * clock()

    monitor = Monitor(SimulatedDevice(Constant(500.0), clock), now=clock, rails=[FakeRail("cpu", "energy", answer)])
    drive(monitor.sampler.poll_once, clock, 6.0)
    assert monitor.errors["rail:cpu"].count > 30
    assert monitor.window(1.0, 1.5).rails_j == {"cpu": pytest.approx(40.0)}
    assert monitor.window(3.0, 5.0).rails_j is None
    assert monitor.window(3.0, 5.0).energy_j == pytest.approx(1000.0, rel=0.02)


def test_errors_are_counted_with_the_last_reason():
    tracks = Tracks({}, None, poll_period_s=0.005, sample_period_s=0.025, rails=[RailKind("cpu", "energy")])
    for reason in ("first", "second"):
        tracks.ingest(Reading("temperature_c", 0.0, 0.1, None, reason))
    assert tracks.errors["temperature_c"].count == 2
    assert tracks.errors["temperature_c"].last_reason == "second"


@pytest.mark.parametrize("call", ["total_energy_j", "power_instant_w", "sm_clock_mhz", "temperature_c"])
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf])
def test_a_reading_that_is_no_finite_number_is_a_failure(call, nonsense):
    clock, device, monitor = rig(failing={"total_energy_j": ReadFailed("absent")} if call == "power_instant_w" else {})
    answer, count = getattr(device, call), iter(range(10**6))
    setattr(device, call, lambda: nonsense if next(count) % 7 == 3 else answer())
    drive(monitor.sampler.poll_once, clock, 6.0)
    assert monitor.errors[call].last_reason == f"the answer is {nonsense}"
    window = monitor.window(1.0, 5.0)
    assert window.energy_j == pytest.approx(2000.0, rel=0.03)
    assert window.sm_clock_mhz == 1500.0 and window.temperature_c == 60.0


def test_a_highest_clock_that_is_infinite_is_unknown():
    probes = {call: Probe("supported", value=1.0) for call in ("sm_clock_mhz", "sm_clock_max_mhz")}
    probes |= {
        "throttle_s": Probe("supported", value={"sw_thermal": 0.0}),
        "sm_clock_max_mhz": Probe("supported", value=math.inf),
    }
    assert Tracks(probes, None, poll_period_s=0.005, sample_period_s=0.025).slow is None


@pytest.mark.parametrize("glitch_j", [0.0, 1e7])
def test_a_counter_that_answers_nonsense_once_keeps_its_bounds(glitch_j):
    for at in range(180, 210):
        clock, device, monitor = rig(tick_phase_s=0.03)
        answer, count = device.total_energy_j, iter(range(10**6))
        device.total_energy_j = lambda answer=answer, count=count, at=at: glitch_j if next(count) == at else answer()
        drive(monitor.sampler.poll_once, clock, 14.0)
        breaks = monitor.sampler.tracks.energy._breaks
        assert breaks
        middle_s = breaks[0].start_s
        for start_s in np.arange(middle_s - 1.5, middle_s + 0.6, 0.013):
            for end_s in (start_s + 0.4, start_s + 1.1):
                found = monitor.sampler.tracks.energy.difference(start_s, end_s)
                if found.value is not None:
                    assert abs(found.value - device.true_energy_j(start_s, end_s)) <= found.bound


def test_a_counter_that_stands_still_is_an_answer_and_heals():
    clock, device, monitor = rig()
    answer, held = device.total_energy_j, []

    def sticky():
        value = answer()
        if 4.0 < clock() < 9.0:
            held.append(value)
            return held[0]
        return value

    device.total_energy_j = sticky
    drive(monitor.sampler.poll_once, clock, 8.0)
    assert "has not moved for" in monitor.window(3.0, 7.0).energy_null_reason
    assert monitor.ready(7.0)
    drive(monitor.sampler.poll_once, clock, 14.0)
    for start_s in np.arange(1.0, 12.0, 0.37):
        window = monitor.window(start_s, start_s + 1.5)
        if window.energy_j is not None:
            assert abs(window.energy_j - 750.0) <= window.energy_bound_j
    assert monitor.window(11.0, 13.0).energy_j == pytest.approx(1000.0, rel=0.02)


def test_a_reading_that_takes_seconds_is_a_hole():
    clock, device, monitor = rig(SquareWave(700.0, 300.0, 3.1))
    answer, hung = device.total_energy_j, []

    def slow():
        if clock() > 5.0 and not hung:
            hung.append(True)
            clock.advance(2.5)
        return answer()

    device.total_energy_j = slow
    drive(monitor.sampler.poll_once, clock, 14.0)
    assert "a reading of the energy counter took 2.5" in monitor.window(4.0, 9.0).energy_null_reason
    assert monitor.window(4.0, 9.0).invalid_reason is not None
    for start_s in np.arange(1.0, 12.0, 0.19):
        window = monitor.window(start_s, start_s + 1.5)
        if window.energy_j is not None:
            assert abs(window.energy_j - device.true_energy_j(start_s, start_s + 1.5)) <= window.energy_bound_j
    assert monitor.window(10.0, 13.0).energy_j is not None


def test_a_clock_that_goes_backwards_is_a_break_and_sampling_goes_on():
    clock, device, monitor = rig()
    drive(monitor.sampler.poll_once, clock, 6.0)
    clock.advance(-3.0)
    device.calls.clear()
    drive(monitor.sampler.poll_once, clock, 4.0)
    assert device.calls["power_instant_w"] > 30 and device.calls["total_energy_j"] > 10
    drive(monitor.sampler.poll_once, clock, 20.0)
    assert monitor.window(5.0, 8.0).energy_null_reason == "the clock went backwards"
    assert monitor.window(3.5, 5.0).energy_j is None
    assert monitor.window(1.0, 2.5).energy_j == pytest.approx(750.0, rel=0.02)
    assert monitor.window(12.0, 15.0).energy_j == pytest.approx(1500.0, rel=0.02)


def test_no_curve_is_interpolated_over_a_clock_that_went_backwards():
    for curve in (CumulativeCurve("it", 0.1), CounterCurve(0.1)):
        for time_s, value in [(0.1 * i, 10.0 * i) for i in range(60)]:
            curve.add(time_s, value)
        for time_s, value in [(3.0 + 0.1 * i, 600.0 + 10.0 * i) for i in range(80)]:
            curve.add(time_s, value)
        assert curve.difference(5.8, 6.2).value is None
        assert curve.difference(1.0, 2.0).value == pytest.approx(100.0, rel=0.2)
        assert curve.difference(8.0, 9.0).value == pytest.approx(100.0, rel=0.2)


def row(file, time_s):
    file.add(Reading("sample", time_s, time_s, {"power_w": 500.0}))


def test_an_appended_file_goes_on_after_its_last_whole_line(tmp_path):
    path = tmp_path / "telemetry.csv"
    file = SampleFile(path)
    for i in range(3):
        row(file, float(i))
    file.close()
    path.write_bytes(path.read_bytes()[:-4])  # as a kill leaves it
    file = SampleFile(path, append=True)
    row(file, 9.0)
    file.close()
    with path.open(newline="") as lines:
        rows = list(csv.reader(lines))
    assert rows[0] == list(CSV_COLUMNS)
    assert [line[0] for line in rows[1:]] == ["0.0000", "1.0000", "9.0000"]
    assert all(len(line) == len(CSV_COLUMNS) for line in rows)


@pytest.mark.parametrize("content", [None, b"", b"time_s,pow"])
def test_appending_to_nothing_starts_with_a_header(tmp_path, content):
    path = tmp_path / "telemetry.csv"
    if content is not None:
        path.write_bytes(content)
    file = SampleFile(path, append=True)
    row(file, 1.0)
    file.close()
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(CSV_COLUMNS) and len(lines) == 2


def test_without_append_a_file_is_new(tmp_path):
    path = tmp_path / "telemetry.csv"
    path.write_text("old\n")
    SampleFile(path).close()
    assert path.read_text() == ",".join(CSV_COLUMNS) + "\n"
