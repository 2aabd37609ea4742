"""The plant's joules are the integral of its power, and its instruments behave as described."""

import numpy as np
import pytest

from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, Ramp, SimulatedDevice, SquareWave


@pytest.mark.parametrize(
    "profile",
    [
        Constant(500.0),
        SquareWave(700.0, 300.0, 0.037, phase_s=0.011),
        SquareWave(700.0, 300.0, 0.02, duty=0.25),
        Ramp(300.0, 700.0, 0.4, 1.1),
    ],
)
def test_energy_is_the_integral_of_power(profile):
    edges = np.linspace(0.0, 2.0, 200_001)
    middles = (edges[1:] + edges[:-1]) / 2
    numeric = np.cumsum([profile.power_w(t) for t in middles]) * (edges[1] - edges[0])
    for i in (1, 12_345, 77_777, 200_000):
        assert profile.energy_j(edges[i]) == pytest.approx(numeric[i - 1], rel=1e-4, abs=0.02)


def test_the_counter_moves_only_at_its_ticks():
    clock = ManualClock(1.0)
    device = SimulatedDevice(Constant(500.0), clock, tick_s=0.1, tick_phase_s=0.03)
    before = device.total_energy_j()
    clock.advance(0.029)
    assert device.total_energy_j() == before
    clock.advance(0.002)
    assert device.total_energy_j() - before == pytest.approx(50.0, abs=0.002)


def test_averaged_power_lags():
    clock = ManualClock(1.5)
    device = SimulatedDevice(Ramp(300.0, 700.0, 1.0, 1.0 + 1e-9), clock)
    assert device.power_instant_w() == pytest.approx(700.0)
    assert device.power_average_w() == pytest.approx(500.0)


def test_it_says_that_it_is_simulated():
    device = SimulatedDevice(Constant(500.0), ManualClock())
    assert device.name.startswith("simulated ")
    assert device.describe()["simulated"] is True
