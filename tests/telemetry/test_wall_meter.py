"""The wall socket's CSV: what is accepted, what is refused and why, joules with a bound, and the clocks' lag."""

import datetime
import time

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.telemetry.wall_meter import WallMeter

NOON_S = 1_796_040_000.0  # 2026-11-30T12:00:00Z


def meter_from(tmp_path, text):
    path = tmp_path / "wall.csv"
    path.write_text(text)
    return WallMeter.from_csv(path)


def utc(unix_s):
    return datetime.datetime.fromtimestamp(unix_s, datetime.UTC).isoformat()


@pytest.mark.parametrize(
    "text",
    [
        f"{NOON_S},100\n{NOON_S + 1},120\n",
        f"timestamp,power_w\n{NOON_S},100\n{NOON_S + 1},120\n",
        f"Watts, TS\n100, {NOON_S}\n120, {NOON_S + 1}\n",
        f"\ufefftime,W\r\n{NOON_S},100\r\n\r\n{NOON_S + 1},120\r\n",
        f"time,volts,power\n{NOON_S},230,100\n{NOON_S + 1},231,120\n",
        f"{NOON_S * 1e3:.0f},100\n{(NOON_S + 1) * 1e3:.0f},120\n",
        f"time,power\n{utc(NOON_S)},100\n{utc(NOON_S + 1)},120\n",
        "2026-11-30T12:00:00Z,100\n2026-11-30T13:00:01+01:00,120\n",
        f"{NOON_S + 1},120\n{NOON_S},90\n{NOON_S},110\n",
    ],
    ids=["bare", "header", "swapped", "bom and CRLF", "third column", "ms", "iso", "zones", "unordered, twice"],
)
def test_ways_to_write_the_same_log(tmp_path, text):
    meter = meter_from(tmp_path, text)
    assert meter.unix_s.tolist() == [NOON_S, NOON_S + 1]
    assert meter.power_w.tolist() == [100.0, 120.0]


def test_iso_without_a_zone_is_local_time_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Etc/GMT-3")  # three hours east of Greenwich
    time.tzset()
    try:
        meter = meter_from(tmp_path, "2026-11-30 15:00:00,100\n2026-11-30 15:00:01,100\n")
        assert meter.unix_s.tolist() == [NOON_S, NOON_S + 1]
        assert "local time" in meter.timestamps
        with pytest.raises(InputError, match="taken as local time"):
            meter.energy(0.0, 1.0)
        assert "local" not in meter_from(tmp_path, "2026-11-30T12:00:00Z,100\n").timestamps
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("last", [f"{NOON_S + 2},12", f"{NOON_S + 2},", f"{NOON_S + 2}", "17", "2026-11-30T12:0"])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, last):
    """`...,12` may have been `...,120`: no line end means that nobody can know."""
    meter = meter_from(tmp_path, f"{NOON_S},100\n{NOON_S + 1},120\n{last}")
    assert meter.power_w.tolist() == [100.0, 120.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no complete data row"),
        ("time,power\n", "no complete data row"),
        (f"{NOON_S},100", "no complete data row"),
        (f"time,power\n{NOON_S},100\n{NOON_S + 1},n/a\n", "line 3: power 'n/a' is not a number of watts"),
        (f"{NOON_S},100\n{NOON_S + 1},nan\n", "line 2: power 'nan'"),
        (f"{NOON_S},100\nlater,100\n", "line 2: timestamp 'later' is neither Unix time nor ISO 8601"),
        (f"{NOON_S},100\n{NOON_S + 1},-3\n", "line 2: power -3 W is negative"),
        (f"{NOON_S},100\n{NOON_S + 1}\n", "line 2 has 1 columns; 2 are needed"),
        (f"{NOON_S},100,5\n", "line 1 has 3 columns; 2 are needed"),
        (f"time,volts\n{NOON_S},230\n", "line 1: the header 'time,volts' needs one column of timestamp/time/ts"),
        (f"date,consumption\n{NOON_S},230\n", "line 1: the header 'date,consumption' needs"),
        (f"time,w,watts\n{NOON_S},1,2\n", "needs one column"),
        (f"{NOON_S},1\n{NOON_S * 1e3},1\n{NOON_S + 1},1\n", "line 2: timestamp .* is not Unix seconds"),
        (f"{NOON_S * 1e6},1\n", "line 1: timestamp .* is not Unix milliseconds"),
    ],
)
def test_what_is_refused_is_named(tmp_path, text, words):
    with pytest.raises(InputError, match=words) as caught:
        meter_from(tmp_path, text)
    assert "\n" not in str(caught.value) and "wall.csv" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        WallMeter.from_csv(tmp_path / "none.csv")
    (tmp_path / "wall.csv").write_bytes(b"\xff\xfe1\x002\x00")
    with pytest.raises(InputError, match="not text in UTF-8"):
        WallMeter.from_csv(tmp_path / "wall.csv")


def test_energy_of_a_ramp_is_exact_at_any_ends():
    times_s = NOON_S + np.arange(0.0, 60.0)
    meter = WallMeter(times_s, 100.0 + 2.0 * (times_s - NOON_S))
    energy_j, bound_j, null_reason = meter.energy(NOON_S + 10.3, NOON_S + 20.6)
    assert energy_j == pytest.approx(100.0 * 10.3 + 20.6**2 - 10.3**2)
    assert null_reason is None
    # 11 intervals are touched, 2 W each, half a second; 1 s times the range of 4 samples at each end; 1 s times 20.6 W.
    assert bound_j == pytest.approx(11.0 + 2 * 6.0 + 20.6)


def test_ends_on_the_first_and_the_last_sample():
    meter = WallMeter(NOON_S + np.arange(4.0), np.array([100.0, 200.0, 200.0, 100.0]))
    energy_j, bound_j, _ = meter.energy(NOON_S, NOON_S + 3)
    assert energy_j == pytest.approx(500.0)
    assert bound_j == pytest.approx(100.0 + 100.0 + 100.0)


def test_the_truth_is_within_the_bound():
    """A meter that averages over its period and is up to a period late, on power that switches at random."""
    generator = np.random.default_rng(0)
    fine_s = np.arange(0.0, 120.0, 0.01)
    fine_w = np.repeat(generator.choice([120.0, 350.0, 900.0], 60), 200)
    fine_j = np.concatenate([[0.0], np.cumsum(fine_w) * 0.01])
    for delay_s in (0.0, 0.4, 0.9):
        ends_s = np.arange(2.0, 118.0)
        mean_w = np.interp(ends_s, fine_s, fine_j[:-1]) - np.interp(ends_s - 1, fine_s, fine_j[:-1])
        meter = WallMeter(NOON_S + ends_s - 0.5 + delay_s, mean_w)
        for _ in range(50):
            start_s = generator.uniform(5, 60)
            end_s = start_s + generator.uniform(1, 50)
            energy_j, bound_j, _ = meter.energy(NOON_S + start_s, NOON_S + end_s)
            true_j = np.interp(end_s, fine_s, fine_j[:-1]) - np.interp(start_s, fine_s, fine_j[:-1])
            assert abs(energy_j - true_j) <= bound_j + 1e-3  # Unix seconds as doubles: 0.2 us


@pytest.mark.parametrize(
    ("window", "words"),
    [
        ((-7200.0, -3600.0), r"from 2026-11-30T12:00:00.000Z to 2026-11-30T12:00:59.000Z .* the window from "
            r"2026-11-30T10:00:00.000Z to 2026-11-30T11:00:00.000Z: the log starts 3600.0 s after the window ends"),
        ((79.0, 90.0), "the log ends 20.0 s before the window starts"),
        ((-12.5, 10.0), "the first 12.5 s of the window are missing"),
        ((50.0, 60.0), "the last 1.0 s of the window are missing"),
        ((-1.0, 60.0), "the first 1.0 s and the last 1.0 s of the window are missing"),
        ((20.0, 10.0), "the end must be later than the start"),
        ((10.0, float("nan")), "the end must be later than the start"),
    ],
)  # fmt: skip
def test_a_window_that_the_log_does_not_cover(window, words):
    meter = WallMeter(NOON_S + np.arange(60.0), np.full(60, 100.0))
    with pytest.raises(InputError, match=words) as caught:
        meter.energy(NOON_S + window[0], NOON_S + window[1])
    assert "\n" not in str(caught.value)


def test_milliseconds_read_as_seconds_are_still_a_message():
    with pytest.raises(InputError, match="before the window starts"):
        WallMeter(np.arange(5.0), np.ones(5)).energy(NOON_S * 1e6, NOON_S * 1e6 + 1)


@pytest.mark.parametrize(
    ("period_s", "pause_s", "gap"), [(1.0, 4.9, False), (1.0, 5.1, True), (0.1, 4.9, False), (10.0, 49.0, False),
                                     (10.0, 51.0, True)]
)  # fmt: skip
def test_a_gap_inside_leaves_the_energy_unknown(period_s, pause_s, gap):
    before_s = NOON_S + np.arange(20) * period_s
    after_s = before_s[-1] + pause_s + np.arange(20) * period_s
    meter = WallMeter(np.concatenate([before_s, after_s]), np.full(40, 100.0))
    energy_j, bound_j, null_reason = meter.energy(before_s[1], after_s[-1])
    if gap:
        assert energy_j is None and bound_j is None
        assert f"a gap of {pause_s:.1f} s from 2026-11-30T12:" in null_reason
        assert meter.energy(before_s[1], before_s[-1] + 0.01).energy_j is None  # it ends in the gap
        assert meter.energy(before_s[1], before_s[-1]).energy_j == pytest.approx(18 * period_s * 100.0)
    else:
        assert energy_j == pytest.approx((after_s[-1] - before_s[1]) * 100.0)


def gpu_and_meter(lag_s, *, meter_period_s=1.0, noise_w=5.0):
    """A GPU's samples at 40 Hz, and a meter with the machine's rest on top whose clock is ahead by `lag_s`."""
    generator = np.random.default_rng(1)
    gpu_s = np.arange(0.0, 300.0, 0.025)
    gpu_w = np.where((gpu_s % 71.0 < 40.0) & (gpu_s > 30.0), 650.0, 120.0) + generator.normal(0, 20.0, gpu_s.shape)
    ends_s = np.arange(-90.0, 390.0, meter_period_s)
    gpu_j = np.concatenate([[0.0], np.cumsum(gpu_w[:-1] * 0.025)])
    half_s = meter_period_s / 2
    mean_w = (np.interp(ends_s + half_s, gpu_s, gpu_j) - np.interp(ends_s - half_s, gpu_s, gpu_j)) / meter_period_s
    wall_w = 150.0 + 1.12 * mean_w + generator.normal(0, noise_w, mean_w.shape)
    return NOON_S + gpu_s, gpu_w, WallMeter(NOON_S + ends_s + lag_s, wall_w)


@pytest.mark.parametrize("lag_s", [0.0, 3.4, -17.0, 59.0])
def test_the_lag_between_the_clocks(lag_s):
    gpu_s, gpu_w, meter = gpu_and_meter(lag_s)
    found = meter.best_lag(gpu_s, gpu_w)
    assert found.lag_s == pytest.approx(lag_s, abs=0.11)
    assert found.correlation > 0.98
    assert found.null_reason is None


@pytest.mark.parametrize("lag_s", [75.0, -75.0])
def test_a_lag_beyond_what_is_tried_is_not_guessed(lag_s):
    gpu_s, meter_s = NOON_S + np.arange(0.0, 300.0, 0.1), NOON_S + np.arange(-100.0, 400.0)
    meter = WallMeter(meter_s, np.where(meter_s - lag_s < NOON_S + 150.0, 200.0, 800.0))
    found = meter.best_lag(gpu_s, np.where(gpu_s < NOON_S + 150.0, 100.0, 700.0))
    assert found.lag_s is None and found.correlation is None
    assert "largest lag tried" in found.null_reason


def test_no_lag_without_something_to_compare():
    gpu_s, gpu_w, meter = gpu_and_meter(0.0)
    assert "does not vary" in meter.best_lag(gpu_s, np.full_like(gpu_w, 300.0)).null_reason
    assert "overlap too little" in meter.best_lag(gpu_s + 1e6, gpu_w).null_reason
    assert "too few" in meter.best_lag(gpu_s[:1], gpu_w[:1]).null_reason
