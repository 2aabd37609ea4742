"""The measuring protocol against work whose cost is known."""

import collections

import pytest

from jaxchunk.bench.protocol import Variant, bootstrap_median, interleave, ratios
from jaxchunk.telemetry import Monitor


class Clock:
    """Time that passes only when work is done."""

    time_s = 0.0

    def __call__(self):
        return self.time_s


def variant(name, seconds, clock, log):
    def call():
        clock.time_s += seconds
        log.append(name)
        return ()

    return Variant(name, call)


def measure(repeats=6, seed=0):
    clock, log = Clock(), []
    variants = [variant("slow", 0.2, clock, log), variant("fast", 0.1, clock, log)]
    monitor = Monitor(None, reason_if_none="no GPU", now=clock)
    return list(interleave(variants, monitor, repeats=repeats, window_s=1.0, seed=seed)), log


def test_every_variant_is_measured_in_every_repeat_for_the_window():
    measurements, _ = measure()
    assert collections.Counter((m.variant, m.repeat) for m in measurements) == collections.Counter(
        (name, repeat) for name in ("slow", "fast") for repeat in range(6)
    )
    for m in measurements:
        assert m.time_s == pytest.approx({"slow": 0.2, "fast": 0.1}[m.variant])
        assert m.calls * m.time_s >= 1.0 - 1e-9
        assert (m.energy_j, m.energy_null_reason) == (None, "no GPU")


def test_the_order_is_shuffled_within_repeats_and_settled_by_the_seed():
    orders = [tuple(m.variant for m in measure(seed=3)[0]) for _ in range(2)]
    assert orders[0] == orders[1]
    pairs = {orders[0][i : i + 2] for i in range(0, 12, 2)}
    assert pairs == {("slow", "fast"), ("fast", "slow")}


def test_ratios_are_formed_repeat_by_repeat():
    measurements, _ = measure()
    assert ratios(measurements, "slow", "fast") == pytest.approx([2.0] * 6)
    assert ratios(measurements, "slow", "fast", "energy_j") == []
    assert ratios(measurements, "slow", "absent") == []


def test_bootstrap_interval_holds_the_median_and_shrinks():
    wide = bootstrap_median([1.0, 2.0, 3.0, 4.0, 5.0])
    assert wide.median == 3.0
    assert 1.0 <= wide.low < 3.0 < wide.high <= 5.0
    narrow = bootstrap_median([1.0, 2.0, 3.0, 4.0, 5.0] * 40)
    assert narrow.high - narrow.low < wide.high - wide.low
    assert bootstrap_median([7.0]) == (7.0, 7.0, 7.0)
