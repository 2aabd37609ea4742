"""The device's own power samples: put on our clock, integrated, and a dear counter's joules distributed by them."""

import itertools
import random
import time
from bisect import bisect_right

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.telemetry import Monitor, ReadFailed, open_monitor
from jaxchunk.telemetry.device import PowerSamples
from jaxchunk.telemetry.power_samples import SampleCurve, SampleReader, distribute
from jaxchunk.telemetry.reading import Reading
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice, drive, make_counter_dear

COUNTER_S = 0.0035  # what a reading of the counter costs on an H200


class Steps:
    """Power of steps of about `step_s`: forward, head and backward swing within a layer, the optimizer draws less."""

    def __init__(self, seed, step_s=0.41, layer_s=0.011, swing=0.15, until_s=30.0):
        generator, time_s = random.Random(seed), 0.0
        times_s, powers_w, self.starts_s = [0.0], [], [0.0]
        while time_s < until_s:
            length_s = step_s * generator.uniform(0.995, 1.005)
            for share, level_w, swings in ((0.22, 690, True), (0.28, 720, True), (0.42, 690, True), (0.08, 480, False)):
                layers = max(1, round(share * length_s / layer_s)) if swings else 1
                for high in (1, -1) * layers:
                    time_s += share * length_s / layers / 2
                    powers_w.append(level_w * (1 + high * swing * swings))
                    times_s.append(time_s)
            self.starts_s.append(time_s)
        self._times_s, self._powers_w = times_s, powers_w
        self._energy_j = np.concatenate([[0.0], np.cumsum(np.diff(times_s) * powers_w)])

    def power_w(self, time_s):
        return self._powers_w[min(bisect_right(self._times_s, time_s), len(self._powers_w)) - 1]

    def energy_j(self, time_s):
        return float(np.interp(time_s, self._times_s, self._energy_j))


def rig(profile, tmp_path=None, seed=1, **options):
    clock, cpu, generator = ManualClock(), ManualClock(), random.Random(seed)
    device = SimulatedDevice(profile, clock, tick_phase_s=generator.random() * 0.1, **options)
    make_counter_dear(device, clock, cpu, COUNTER_S, generator)
    record_path = None if tmp_path is None else tmp_path / "readings.jsonl"
    return clock, device, Monitor(device, now=clock, cpu_time=cpu, record_path=record_path)


def step_windows(profile, until_s=27.0, **options):
    """The windows of the steps, and their true joules."""
    clock, device, monitor = rig(profile, **options)
    drive(monitor.sampler.poll_once, clock, profile.starts_s[-1], lateness_s=0.001)
    steps = [step for step in itertools.pairwise(profile.starts_s) if step[0] > 8.0 and step[1] < until_s]
    return [monitor.window(*step) for step in steps], [device.true_energy_j(*step) for step in steps]


@pytest.mark.parametrize("layer_s", [0.004, 0.011, 0.0203])
def test_steps_have_energies_although_the_counter_is_dear(layer_s):
    windows, true_j = step_windows(Steps(3, layer_s=layer_s), samples_every_s=0.02, sample_mean_s=0.02)
    assert {window.energy_source for window in windows} == {"nvml_energy_by_samples"}
    for window, joules in zip(windows, true_j, strict=True):
        assert abs(window.energy_j - joules) < min(0.01 * joules, window.energy_bound_j)
    total_j = sum(window.energy_j for window in windows)
    assert total_j == pytest.approx(sum(true_j), rel=3e-3)  # where the samples' errors have cancelled, the counter's


def test_without_samples_they_have_none():
    windows, _ = step_windows(Steps(3))
    assert np.mean([window.energy_j is None for window in windows]) > 0.5
    assert {window.energy_source for window in windows} == {"nvml_total_energy"}


def test_a_swing_that_momentary_samples_may_miss_is_within_the_bound():
    """+-8% within layers whose rhythm the samples nearly have: steps are off by up to that much, and it is said."""
    worst = 0.0
    for seed, layer_s in enumerate((0.004, 0.0099, 0.0198, 0.0203, 0.021)):
        clock, device, monitor = rig(Steps(seed, layer_s=layer_s, swing=0.08), samples_every_s=0.02)
        profile = device.profile
        drive(monitor.sampler.poll_once, clock, profile.starts_s[-1], lateness_s=0.001)
        for start_s, end_s in itertools.pairwise(s for s in profile.starts_s if 8.0 < s < 27.0):
            found, source = monitor.sampler.tracks.energy_between(start_s, end_s)
            error_j = abs(found.value - device.true_energy_j(start_s, end_s))
            assert source == "nvml_energy_by_samples" and error_j <= found.bound
            worst = max(worst, error_j / found.value)
    assert worst > 0.03


def test_a_scale_of_the_samples_that_is_wrong_is_the_counters():
    """Samples that are all 3% too high: the counter is believed, and the bound says that they disagree."""
    clock, device, monitor = rig(Steps(3), samples_every_s=0.02, sample_mean_s=0.02)
    honest = device.power_samples_w

    def too_high():
        answer = honest()
        return answer._replace(samples=[(time_s, 1.03 * power_w) for time_s, power_w in answer.samples])

    device.power_samples_w = too_high
    drive(monitor.sampler.poll_once, clock, 25.0)
    found, source = monitor.sampler.tracks.energy_between(20.0, 20.4)
    true_j = device.true_energy_j(20.0, 20.4)
    assert source == "nvml_energy_by_samples"
    assert found.value == pytest.approx(true_j, rel=0.01)
    assert found.bound > 0.08 * true_j


def test_a_long_window_is_the_counters():
    clock, _, monitor = rig(Constant(600.0), samples_every_s=0.02)
    drive(monitor.sampler.poll_once, clock, 40.0)
    assert monitor.window(12.0, 34.0).energy_source == "nvml_total_energy"


def test_a_replay_has_the_same_windows(tmp_path):
    profile = Steps(5, until_s=20.0)
    clock, _, monitor = rig(profile, tmp_path, samples_every_s=0.02, sample_mean_s=0.02)
    drive(monitor.sampler.poll_once, clock, 20.0)
    steps = [step for step in itertools.pairwise(profile.starts_s) if 8.0 < step[0] < 17.0]
    windows = [monitor.window(*step) for step in steps]
    monitor.stop()
    replayed = Monitor.replay(tmp_path / "readings.jsonl")
    assert [replayed.window(*step) for step in steps] == windows


def test_samples_that_end_leave_the_counter():
    profile = Steps(3)
    clock, device, monitor = rig(profile, samples_every_s=0.02, sample_mean_s=0.02)
    drive(monitor.sampler.poll_once, clock, 12.0)
    device.failing["power_samples_w"] = ReadFailed("NVML_ERROR_GPU_IS_LOST")
    drive(monitor.sampler.poll_once, clock, 25.0)
    assert monitor.ready(20.0)
    assert monitor.window(9.0, 9.5).energy_source == "nvml_energy_by_samples"
    assert monitor.window(18.0, 18.5).energy_source == "nvml_total_energy"
    assert monitor.errors["power_samples_w"].last_reason == "NVML_ERROR_GPU_IS_LOST"


def test_a_hole_in_the_samples_is_not_bridged():
    curve = SampleCurve()
    samples = [(0.02 * i, 500.0) for i in range(100)]
    curve.add_samples(1.0, 1.0, samples[:50])
    curve.add_samples(2.0, 2.0, samples[60:])
    assert curve.difference(0.1, 0.9).value == pytest.approx(400.0)
    assert curve.difference(1.3, 1.9).value == pytest.approx(300.0)
    assert "hole of 0.22 s" in curve.difference(0.5, 1.5).null_reason


TIMES_S = np.arange(10.0, 40.0, 0.9).tolist()


def readings(clock_s, times_s):
    """Readings of 1 ms at times of ours; the device's clock is ahead by `clock_s(time)`, its samples 20 ms apart."""
    for time_s in times_s:
        asked_s = time_s + 0.0004 + clock_s(time_s)
        taken_s = [n * 0.02 for n in range(int((time_s - 2.4) / 0.02), int(time_s / 0.02))]
        samples = [(t + clock_s(t), 1000.0 * t) for t in taken_s]
        yield Reading("power_samples_w", time_s, time_s + 0.001, PowerSamples(asked_s, samples))


def test_samples_come_once_and_on_our_clock():
    reader = SampleReader()
    found = [pair for r in readings(lambda t: 1.7e9 + 8e-5 * t, TIMES_S) for pair in new(reader, r)]
    assert len(found) == len({time_s for time_s, _ in found})
    assert np.diff([time_s for time_s, _ in found]) == pytest.approx(0.02, abs=1e-3)
    for time_s, power_w in found:
        assert time_s == pytest.approx(power_w / 1000.0, abs=1e-3)


@pytest.mark.parametrize("by_s", [-30.0, -0.01, 0.01, 3600.0])
def test_a_clock_that_was_set_puts_no_sample_at_a_wrong_time(by_s):
    reader = SampleReader()
    answers = [reader.new(r) for r in readings(lambda t: 1.7e9 + by_s * (t >= 20.0), TIMES_S)]
    lost = [answer for answer in answers if answer.value is None]
    assert 2 <= len(lost) <= 4 and "was set" in lost[0].error
    for time_s, power_w in itertools.chain(*(answer.value.samples for answer in answers if answer.value)):
        assert time_s == pytest.approx(power_w / 1000.0, abs=2e-3)


@pytest.mark.gpu
@pytest.mark.alone
def test_steps_on_a_gpu_have_the_joules_of_the_ticks_around_them():
    """Bursts and pauses between ticks that are each seen: there the counter alone knows the joules to a per cent."""
    monitor = open_monitor(jax.devices()[0])
    if not monitor.probes["power_samples_w"].supported:
        pytest.skip("this GPU keeps no samples of its power")
    work = jax.jit(lambda a: jax.lax.fori_loop(0, 40, lambda _, x: (a @ x) * 0.01, a))
    a = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    jax.block_until_ready(work(a))
    ticks, stop_s = [], time.perf_counter() + 15.0
    with monitor:
        generator, last = random.Random(0), monitor.device.total_energy_j()
        last_s = monitor.now()
        while time.perf_counter() < stop_s:
            if generator.random() < 0.5:
                result = work(a)  # about 60 ms, asynchronous
            else:
                time.sleep(generator.uniform(0.02, 0.1))
            for _ in range(8):
                energy_j = monitor.device.total_energy_j()
                now_s = monitor.now()
                if energy_j > last:
                    ticks.append(((last_s + now_s) / 2, energy_j))
                last, last_s = energy_j, now_s
        jax.block_until_ready(result)
        monitor.wait_ready(monitor.now(), 3.0)
    found = []
    for (start_s, start_j), (end_s, end_j) in zip(ticks[40:-30:3], ticks[44:-26:3], strict=True):  # windows of 0.4 s
        shared = distribute(monitor.sampler.tracks.energy, monitor.sampler.tracks.samples, start_s, end_s)
        assert shared.value is not None
        found.append((shared.value / (end_j - start_j) - 1.0, shared.bound / (end_j - start_j)))
    errors, bounds = np.abs(np.array(found)).T
    print(f"{len(found)} windows: error p50 {np.median(errors):.2%}, max {errors.max():.2%}; bound {bounds.max():.2%}")
    assert len(found) > 20
    assert np.mean(errors > bounds + 0.02) == 0  # 0.02: the ticks' own times, 5 ms in 0.4 s at each end


def new(reader, reading):
    return reader.new(reading).value.samples
