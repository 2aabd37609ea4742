"""Cumulative curves: interpolation, and where there must be none."""

import pytest

from jaxchunk.telemetry.curve import CumulativeCurve


def filled(times_s, slope=2.0, period_s=0.1):
    curve = CumulativeCurve("the counter", period_s)
    for time_s in times_s:
        curve.add(time_s, slope * time_s)
    return curve


def test_linear_between_knots():
    curve = CumulativeCurve("the counter", 0.1)
    for time_s, value in [(0.0, 0.0), (0.1, 1.0), (0.2, 4.0), (0.3, 4.0)]:
        curve.add(time_s, value)
    assert curve.difference(0.05, 0.15).value == pytest.approx(2.0)
    assert curve.difference(0.0, 0.3).value == pytest.approx(4.0)
    assert curve.difference(0.22, 0.28).value == pytest.approx(0.0)


def test_before_after_and_empty():
    curve = filled([1.0, 1.1, 1.2])
    early = curve.difference(0.9, 1.1)
    assert early.value is None and not early.pending
    assert "0.100 s before the first known value of the counter" in early.null_reason
    late = curve.difference(1.1, 1.3)
    assert late.value is None and late.pending
    assert curve.difference(1.1, 1.1).null_reason == "the window is empty"
    assert CumulativeCurve("the counter", 0.1).difference(0.0, 1.0).pending
    assert curve.settled(1.2) and not curve.settled(1.21)


def test_a_gap_blocks_windows_that_touch_it_and_no_others():
    curve = filled([0.0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5])
    assert curve.difference(0.0, 0.3).value == pytest.approx(0.6)
    assert curve.difference(1.3, 1.5).value == pytest.approx(0.4)
    for window in [(0.1, 1.4), (0.1, 0.8), (0.8, 1.4), (0.5, 0.6)]:
        result = curve.difference(*window)
        assert result.value is None and not result.pending
        assert result.null_reason == "no reading of the counter for 1.00 s"


def test_a_pause_is_a_gap_only_beyond_both_limits():
    assert filled([0.0, 0.01, 0.49, 0.5], period_s=0.01).difference(0.0, 0.5).value is not None  # under 0.5 s
    assert filled([0.0, 0.2, 1.1, 1.3], period_s=0.4).difference(0.0, 1.3).value is not None  # under 5 periods
    assert filled([0.0, 0.2, 1.3, 1.4], period_s=0.2).difference(0.0, 1.3).value is None


def test_the_error_behind_a_gap_is_in_its_reason():
    curve = filled([0.0, 0.1])
    curve.last_error = "NVML_ERROR_TIMEOUT"
    curve.add(1.0, 3.0)
    curve.add(1.1, 3.5)
    assert curve.difference(0.0, 1.1).null_reason.endswith("last error: NVML_ERROR_TIMEOUT")


def test_an_error_that_left_no_gap_is_not_blamed_for_a_later_one():
    curve = filled([0.0, 0.1])
    curve.last_error = "NVML_ERROR_TIMEOUT"
    for time_s in (0.2, 1.2, 1.3):
        curve.add(time_s, 2.0 * time_s)
    assert curve.difference(0.0, 1.3).null_reason == "no reading of the counter for 1.00 s"


def test_backwards_starts_anew():
    curve = CumulativeCurve("the counter", 0.1)
    for time_s, value in [(0.0, 5.0), (0.1, 6.0), (0.2, 0.5), (0.3, 1.5)]:
        curve.add(time_s, value)
    assert curve.difference(0.0, 0.1).value == pytest.approx(1.0)
    assert curve.difference(0.2, 0.3).value == pytest.approx(1.0)
    assert "went backwards" in curve.difference(0.05, 0.25).null_reason


def test_an_outage_is_seen_before_it_ends():
    curve = filled([0.0, 0.1])
    assert not curve.outage(0.59)
    assert curve.outage(0.61)
    assert curve.outage_reason(1.1) == "no reading of the counter for 1.00 s"


def test_a_reading_at_the_same_time_is_not_a_knot():
    curve = filled([0.0, 0.1, 0.1, 0.2])
    assert len(curve) == 3


def test_forgetting_changes_no_later_window():
    times = [i / 10 for i in range(100)]
    whole, trimmed = filled(times), filled(times)
    trimmed.forget_before(5.05)
    assert len(trimmed) < 55
    assert trimmed.difference(5.05, 7.77) == whole.difference(5.05, 7.77)
    assert trimmed.difference(1.0, 7.0).value is None
