"""The grid of a counter's ticks against ticks whose times are known."""

import random

import pytest

from jaxchunk.telemetry.ticks import TickGrid


def see(grid, tick_s, generator, width_s=0.008):
    """Shows the grid a tick between two times around it."""
    before_s = generator.uniform(0.0, width_s)
    return grid.add(tick_s - before_s, tick_s + width_s - before_s)


def learnt(period_s, seed=0, *, ticks=40, start_s=3.0, width_s=0.008, jitter_s=0.0):
    """A grid and the last tick that it was shown."""
    generator, grid = random.Random(seed), TickGrid()
    for i in range(ticks):
        see(grid, start_s + i * period_s + generator.uniform(-jitter_s, jitter_s), generator, width_s)
    return grid, start_s + (ticks - 1) * period_s


@pytest.mark.parametrize("period_s", [0.1, 0.103, 0.02, 1.0])
def test_the_period_is_found(period_s):
    grid, _ = learnt(period_s, width_s=0.3 * period_s)
    assert grid.period_s == pytest.approx(period_s, rel=0.02)


def test_there_is_no_grid_before_enough_ticks():
    assert learnt(0.1, ticks=TickGrid.LEARNING - 1)[0].period_s is None
    assert learnt(0.1, ticks=TickGrid.LEARNING)[0].period_s is not None


@pytest.mark.parametrize("ticks_ahead", [0, 1, 10, 100])
def test_every_later_tick_is_within_the_error(ticks_ahead):
    for seed in range(200):
        generator = random.Random(seed)
        period_s, width_s = generator.uniform(0.02, 0.3), generator.uniform(0.0, 0.4)
        common_s = min(TickGrid.COMMON_PERIODS_S, key=lambda common_s: abs(common_s - period_s))
        if abs(common_s - period_s) < TickGrid.COMMON_WITHIN * common_s:
            period_s = common_s  # one that is nearly so has a test of its own
        grid, last_s = learnt(period_s, seed, ticks=generator.randint(8, 60), width_s=width_s * period_s)
        if grid.period_s is None:
            continue
        true_s = last_s + ticks_ahead * period_s
        if grid.error_s(true_s) < period_s / 2:  # else nobody knows which tick it is
            expected_s = grid.nearest(true_s)
            assert abs(expected_s - true_s) <= grid.error_s(expected_s)


def test_the_error_grows_with_the_time_since_and_is_of_use():
    grid, last_s = learnt(0.1)
    errors_s = [grid.error_s(last_s + ahead_s) for ahead_s in (0.0, 10.0, 100.0)]
    assert 0.0005 < errors_s[0] < 0.008
    assert errors_s[0] < errors_s[1] < errors_s[2]
    assert errors_s[1] < 0.05


@pytest.mark.parametrize("jitter_s", [0.001, 0.003, 0.006])
def test_jitter_widens_the_error(jitter_s):
    outside = 0
    for seed in range(100):
        generator = random.Random(seed)
        grid, last_s = learnt(0.1, seed, jitter_s=jitter_s, width_s=0.002)
        true_s = last_s + 0.1 + generator.uniform(-jitter_s, jitter_s)
        expected_s = grid.nearest(true_s)
        assert grid.error_s(expected_s) > jitter_s / 2
        outside += abs(expected_s - true_s) > grid.error_s(expected_s)
    assert outside == 0


def test_a_common_period_is_taken_up_at_once():
    """Eight ticks, each known to 40 ms, leave 10 ms open: in five periods the error would be half of one."""
    generator, grid = random.Random(0), TickGrid()
    for i in range(TickGrid.LEARNING):
        see(grid, 3.0 + i * 0.1, generator, 0.02)
    assert abs(grid.period_s - 0.1) <= 2 * TickGrid.DRIFT * 0.1
    expected_s = grid.nearest(23.0)
    assert abs(expected_s - 23.0) <= grid.error_s(expected_s) < 0.02


@pytest.mark.parametrize("period_s", [0.0992, 0.1007, 0.1013])
def test_a_period_beside_a_common_one_is_found_once_that_is_contradicted(period_s):
    generator, grid, contradictions = random.Random(4), TickGrid(), 0
    for i in range(300):
        contradictions += not see(grid, 3.0 + i * period_s, generator, 0.012)
    assert contradictions <= 1
    assert grid.period_s == pytest.approx(period_s, rel=1e-3)
    expected_s = grid.nearest(3.0 + 320 * period_s)
    assert abs(expected_s - (3.0 + 320 * period_s)) <= grid.error_s(expected_s)


def test_ticks_without_a_rhythm_have_no_grid():
    generator, grid, time_s, known = random.Random(0), TickGrid(), 0.0, 0
    for _ in range(200):
        time_s += generator.uniform(0.03, 0.3)
        see(grid, time_s, generator)
        known += grid.period_s is not None
    assert known < 20


def test_missed_ticks_matter_only_while_the_rhythm_is_learnt():
    """Behind a gap several periods would fit: seven ticks in 0.7 s and seven in 0.75 s look alike."""
    generator, grid = random.Random(1), TickGrid()
    for i in range(60):
        if i % 5:
            assert see(grid, i * 0.1, generator)
    assert grid.period_s is None  # never eight in a row
    for i in range(60, 120):
        if i < 70 or generator.random() > 0.4:
            assert see(grid, i * 0.1, generator)
    assert grid.period_s == pytest.approx(0.1, rel=0.01)


def test_a_tick_known_badly_is_not_learnt_from():
    grid, last_s = learnt(0.1)
    seen_s = grid.last_seen_s
    before = grid.error_s(last_s), grid.period_s
    for i in range(1, 20):
        assert grid.add(last_s + i * 0.1 - 0.03, last_s + i * 0.1 + 0.029)
    assert (grid.error_s(last_s), grid.period_s) == before
    assert grid.last_seen_s == seen_s  # nor does it confirm the grid


def test_a_bracket_that_is_wide_for_this_grid_does_not_confirm_it():
    """A phase that has jumped by a quarter of a period passes through a bracket of nearly half of one."""
    grid, last_s = learnt(0.1)
    seen_s = grid.last_seen_s
    assert grid.add(last_s + 0.1 - 0.045, last_s + 0.1 + 0.0)
    assert grid.last_seen_s == seen_s
    for ticks in (2, 3):
        assert grid.last_seen_s == seen_s
        assert grid.add(last_s + ticks * 0.1 - 0.005, last_s + ticks * 0.1 + 0.005)
    assert grid.last_seen_s == last_s + 3 * 0.1 + 0.005


def test_one_tick_alone_does_not_confirm_the_grid():
    """Ticks of another period fall on the grid now and then; two in a row do not."""
    grid, last_s = learnt(0.1)
    seen_s = grid.last_seen_s
    assert grid.add(last_s + 1.3 - 0.005, last_s + 1.3 + 0.005)  # ten ticks of 0.13 s later
    assert grid.last_seen_s == seen_s
    assert not grid.add(last_s + 1.43 - 0.005, last_s + 1.43 + 0.005)


def test_a_phase_that_jumps_forgets_and_is_learnt_again():
    grid, last_s = learnt(0.1)
    generator = random.Random(5)
    assert not see(grid, last_s + 0.14, generator)
    assert grid.period_s is None
    for i in range(1, TickGrid.LEARNING):
        assert see(grid, last_s + 0.14 + i * 0.1, generator)
    assert grid.period_s is not None
    assert abs(grid.nearest(last_s + 2.0) - (last_s + 2.04)) < 0.01


def test_old_ticks_sharpen_the_period():
    """Crowded ticks are dropped first, so that 32 of them reach back two minutes."""
    short, _ = learnt(0.1, ticks=16)
    long, last_s = learnt(0.1, ticks=1000)
    assert abs(long.period_s - 0.1) < 2e-5
    assert long.error_s(last_s + 10.0) < short.error_s(last_s + 10.0) / 3
    assert long.error_s(last_s + 10.0) < 0.006


def test_ticks_older_than_the_memory_do_not_count():
    """The device's clock need not keep its pace for longer than that."""
    generator, grid, time_s = random.Random(2), TickGrid(), 0.0
    for i in range(4000):
        time_s += 0.1 + 2e-6 * (i / 4000)  # drifts by 4 ms in the whole run, and by nothing to speak of in two minutes
        assert see(grid, time_s, generator)
    expected_s = grid.nearest(time_s)
    assert abs(expected_s - time_s) <= grid.error_s(expected_s)


def test_the_tick_before_a_reading():
    grid, last_s = learnt(0.1)
    tick_s, error_s = grid.before(last_s + 10.04, last_s + 10.05)
    assert abs(tick_s - (last_s + 10.0)) <= error_s == grid.error_s(tick_s)


@pytest.mark.parametrize(
    ("from_s", "to_s"),
    [(0.0, 0.001), (0.0990, 0.0995), (0.095, 0.105), (0.04, 0.12), (0.001, 0.01), (0.05, 0.0999)],
    ids=["on", "just before", "across", "long and across", "just after", "up to"],
)
def test_a_reading_near_a_tick_belongs_to_none(from_s, to_s):
    grid, last_s = learnt(0.1)
    assert grid.before(last_s + from_s, last_s + to_s) is None


def test_no_grid_knows_no_tick():
    assert TickGrid().before(1.0, 1.001) is None


def test_a_grid_that_is_too_old_keeps_its_period_only():
    grid, last_s = learnt(0.1, ticks=10, width_s=0.015)
    late_s = last_s + 3000.033
    assert grid.error_s(late_s) > 0.05
    assert grid.before(late_s, late_s + 1e-6) is None
    assert not grid.add(late_s - 0.004, late_s + 0.004)  # nothing between then and now was confirmed
    assert grid.period_s is not None
    expected_s = grid.nearest(late_s + 0.1)
    assert abs(expected_s - (late_s + 0.1)) <= grid.error_s(expected_s) < 0.02
