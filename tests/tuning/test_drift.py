"""CUSUM: changes are found soon, noise and single outliers are not."""

import numpy as np
import pytest

from jaxchunk.tuning import drift
from jaxchunk.tuning.drift import Baseline, Cusum

USUAL = Baseline(1.0, 0.01)


def windows_until_alarm(values):
    cusum = Cusum()
    for count, value in enumerate(values, 1):
        cusum, alarm = drift.updated(cusum, float(value), USUAL, change=0.01)
        if alarm:
            return count
    return None


@pytest.mark.parametrize("level", [0.97, 0.99, 1.01, 1.03])
def test_a_change_is_found_within_some_windows(level):
    values = np.random.default_rng(0).normal(level, USUAL.std, 1000)
    assert windows_until_alarm(values) <= (60 if abs(level - 1) < 0.02 else 12)


def test_noise_is_no_change():
    assert windows_until_alarm(np.random.default_rng(1).normal(1.0, USUAL.std, 20_000)) is None


def test_one_window_alone_is_no_change_and_two_are():
    assert windows_until_alarm([1.0, 100.0, 1.0, 1.0]) is None
    assert windows_until_alarm([1.0, 0.0, 0.0]) == 3


def test_a_step_is_not_steady_and_noise_is():
    noise = np.random.default_rng(2).normal(0.0, 0.01, 40)
    assert drift.steady(noise, 0.01)
    assert not drift.steady(noise + 0.05 * (np.arange(40) >= 20), 0.01)
    assert not drift.steady(noise + 0.2 * (np.arange(40) >= 35), 0.01)


def test_levels_apart_are_more_than_noise():
    assert drift.apart(Baseline(1.0, 0.001), Baseline(1.01, 0.001), 0.01, 20)
    assert not drift.apart(Baseline(1.0, 0.001), Baseline(1.004, 0.001), 0.01, 20)
    assert not drift.apart(Baseline(1.0, 0.05), Baseline(1.02, 0.05), 0.01, 20)
