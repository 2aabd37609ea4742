"""Intervals that may be looked at after every value, and the race that is decided by them."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.tuning.candidates import candidate_counts
from jaxchunk.tuning.intervals import anytime_interval
from jaxchunk.tuning.race import Rules, standing, verdict


def test_an_interval_that_is_looked_at_after_every_value_misses_as_rarely_as_it_says():
    random, misses = np.random.default_rng(0), 0
    for _ in range(200):
        values = random.normal(3.0, 2.0, 100)
        intervals = (anytime_interval(values[:n], 0.1) for n in range(2, 101))
        misses += any(not interval.low <= 3.0 <= interval.high for interval in intervals)
    assert misses <= 30  # 0.1 x 200 and three standard deviations; an ordinary interval misses in about 70


def test_it_becomes_narrow_with_values_and_says_nothing_of_one():
    values = np.random.default_rng(1).normal(0.0, 0.01, 400)
    assert anytime_interval(values[:1], 0.05).high == math.inf
    widths = [anytime_interval(values[:n], 0.05).high - anytime_interval(values[:n], 0.05).low for n in (10, 50, 400)]
    assert widths[0] > widths[1] > widths[2] and widths[2] < 0.0045


def costs(means, noise, rounds, seed=0):
    """Log costs by candidate and round, with a level that all of a round share."""
    random = np.random.default_rng(seed)
    level = random.normal(0.0, 0.05, rounds)
    return {
        n: {r: math.log(mean) + level[r] + random.normal(0, noise) for r in range(rounds)} for n, mean in means.items()
    }


def test_worse_candidates_drop_out_and_the_level_of_a_round_cancels():
    now = standing(costs({1: 1.0, 4: 0.95, 16: 1.02}, 0.003, 12), Rules())
    assert now.active == (4,) and now.finished and now.leader == 4
    winner, reason = verdict(now, {1: 3, 4: 2, 16: 1}, Rules(), "time")
    assert winner == 4 and reason.startswith("least time; next is 1 at +5.")


def test_equal_ones_are_no_difference_and_the_smallest_memory_is_taken():
    now = standing(costs({1: 1.0, 4: 1.0005, 16: 1.1}, 0.001, 12), Rules())
    assert now.active == (1, 4) and now.finished
    winner, reason = verdict(now, {1: 3, 4: 2, 16: 1}, Rules(), "energy")
    assert winner == 4 and "no difference in energy between 1, 4 chunks (all within 0.5%)" in reason


def test_cut_short_it_says_so_and_takes_none_that_is_likely_worse():
    now = standing(costs({1: 1.0, 4: 1.001, 16: 1.03}, 0.02, 5), Rules())
    assert len(now.active) == 3 and not now.finished
    estimated = {n: interval.mean for n, interval in now.to_leader.items()}
    winner, reason = verdict(now, {1: 3, 4: 2, 16: 1}, Rules(), "time")
    assert "could be shown" in reason and estimated[winner] <= Rules().tolerance


@settings(max_examples=30, deadline=None)
@given(
    means=st.dictionaries(st.integers(1, 64), st.floats(0.9, 1.1), min_size=1, max_size=4),
    rounds=st.integers(0, 8),
    seed=st.integers(0, 2**20),
)
def test_the_winner_is_always_a_candidate_and_never_one_that_was_dropped(means, rounds, seed):
    now = standing(costs(means, 0.01, rounds, seed), Rules())
    winner = verdict(now, dict.fromkeys(means, 1), Rules(), "time").winner
    assert winner in now.active and set(now.active) <= set(means) and now.leader in now.active


def test_a_best_one_is_hardly_ever_dropped():
    dropped = 0
    for seed in range(60):
        all_costs = costs({1: 1.0, 2: 1.0, 4: 1.004}, 0.01, 15, seed)
        looks = [
            standing({n: dict(list(c.items())[:r]) for n, c in all_costs.items()}, Rules()) for r in (3, 6, 10, 15)
        ]
        dropped += any(1 not in look.active for look in looks)
    assert dropped <= 6


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(65536, (1, 2, 3, 4, 6, 8, 12, 16, 32)), (1024, (1, 2, 4)), (2000, (1, 2, 4)), (7, (1,))],
)
def test_candidates_fill_their_tiles(tokens, expected):
    assert candidate_counts(tokens) == expected
    assert set(candidate_counts(tokens, powers_only=True)) <= {1, 2, 4, 8, 16, 32}
