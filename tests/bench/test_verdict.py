"""What a microbenchmark concludes, from measurements whose truth is known."""

import dataclasses

import pytest

from jaxchunk.bench import verdict
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.measuring.statistics import Interval, ratios

DRIFT = [1.0, 1.05, 0.97, 1.02, 1.1]  # common to a repeat: must cancel
NOISE = [0.0, 0.002, -0.001, 0.001, -0.002]


def measurement(inputs, chunks, repeat, time_s, energy_j, ripple_w=50.0, invalid=None, piece=0):
    factors = {"inputs": inputs, "chunks": chunks, "softmax": "xla"}
    reason = None if energy_j is not None else "no GPU"
    return Measurement(
        variant=f"{inputs}, {chunks}", repeat=repeat, calls=10, time_s=time_s, energy_j=energy_j,
        energy_bound_j=None if energy_j is None else 0.1, energy_source="nvml_total_energy", energy_null_reason=reason,
        power_w=500.0, power_w_std=ripple_w, sm_clock_mhz=1500.0, sm_clock_mhz_std=5.0, temperature_c=60.0,
        throttle={"sw_power_cap": 0.4, "sw_thermal": 0.1}, invalid_reason=invalid, piece=piece, factors=factors,
    )  # fmt: skip


def run(times, inputs="random", energies=None, ripples=None, repeats=5, noise=1.0):
    """Measurements of chunk counts with these times (s) and energies (J) at no drift."""
    energies = energies or times
    return [
        measurement(
            inputs,
            chunks,
            r,
            time_s * DRIFT[r] * (1 + noise * NOISE[(r + chunks) % 5]),
            None
            if energies[chunks] is None
            else energies[chunks] * DRIFT[r] * (1 - noise * NOISE[(r + 2 * chunks) % 5]),
            (ripples or {}).get(chunks, 50.0),
        )
        for r in range(repeats)
        for chunks, time_s in times.items()
    ]


def compare(measurements):
    return verdict.compare(measurements, 1_000_000, {"random, 4": {"memory_bytes": 3}})


def test_rows_relative_to_one_chunk():
    rows = compare(run({4: 0.9, 1: 1.0})).rows
    assert [row.chunks for row in rows] == [1, 4]
    assert rows[1].time_ratio.median == pytest.approx(0.9, rel=0.005)
    assert rows[0].time_ratio == Interval(1.0, 1.0, 1.0)
    assert rows[1].tflops.median == pytest.approx(1e-6 / (0.9 * 1.02), rel=0.01)
    assert rows[1].throttled.median == 0.4 and rows[1].throttle_reasons == {"sw_power_cap": 0.4, "sw_thermal": 0.1}
    assert rows[1].facts == {"memory_bytes": 3} and rows[0].facts == {}
    assert rows[1].energy_bound_j == 0.1


def test_a_gain_is_said_with_its_interval():
    (sentence,) = compare(run({1: 1.0, 4: 0.9, 16: 0.95}, ripples={1: 66.0, 4: 22.0})).sentences
    assert sentence.startswith("random inputs (xla): 4 chunks take 9.9% less (9.")
    assert "%) time than one; 10." in sentence
    assert "% less (" in sentence.split(";")[1] and sentence.endswith("power ripple 66 W against 22 W.")


def test_no_difference_is_said_where_there_is_none():
    (sentence,) = compare(run({1: 1.0, 4: 0.9995, 8: 1.0001})).sentences
    assert "no difference in time between one chunk and " in sentence
    assert "no difference in energy" in sentence
    assert " take " not in sentence


def test_a_tiny_change_is_no_difference_however_sure():
    (sentence,) = compare(run({1: 1.0, 4: 0.9996}, noise=0.0)).sentences
    assert "no difference in time" in sentence and "no difference in energy" in sentence


def test_a_count_that_is_the_best_by_luck_is_no_difference():
    """4 chunks are below 1 in every repeat, but where 8 are slow the other repeats name 8 as the best."""
    eight = [0.9, 0.9, 1.05, 1.06, 1.07]
    measurements = [
        measurement("random", chunks, r, t, t) for r in range(5) for chunks, t in {1: 1.0, 4: 0.99, 8: eight[r]}.items()
    ]
    (sentence,) = compare(measurements).sentences
    assert (
        "between one chunk and 4, the best of the others, that is more than the luck of the draw (5.0% more" in sentence
    )
    assert " take " not in sentence


def test_throttle_seconds_and_ratios():
    row = compare(run({1: 1.0, 4: 0.9}, ripples={1: 60.0, 4: 30.0}, noise=0.0)).rows[1]
    assert row.throttled_s.median == pytest.approx(0.4 * 0.9 * 1.02)
    assert (row.power_ratio.median, row.ripple_ratio.median, row.clock_ripple_ratio.median) == (1.0, 0.5, 1.0)


def test_a_loss_is_said_too():
    (sentence,) = compare(run({1: 1.0, 4: 1.05, 16: 1.2})).sentences
    assert "no chunk count is faster than one; the best, 4, takes" in sentence
    assert "% more (" in sentence


def test_random_and_zero_are_judged_apart():
    found = compare(run({1: 1.0, 4: 0.9}) + run({1: 0.8, 4: 0.8004}, inputs="zero"))
    assert [row.inputs for row in found.rows] == ["random", "random", "zero", "zero"]
    assert "take" in found.sentences[0] and "no difference in time" in found.sentences[1]


def test_unknown_energy_is_said_with_its_reason():
    found = compare(run({1: 1.0, 4: 0.9}, energies={1: None, 4: None}))
    assert "energy is unknown (no GPU)" in found.sentences[0]
    assert found.rows[0].energy_j is None and "| null |" in verdict.table(found)


def test_invalid_windows_are_counted_and_not_averaged():
    spoilt = dataclasses.replace(
        measurement("random", 4, 4, 99.0, 99.0, invalid="no sample for 2.00 s"),
        energy_bound_j=50.0,
        throttle={"sw_power_cap": 1.0, "sw_thermal": 1.0},
    )
    kept = [m for m in run({1: 1.0, 4: 0.9}) if (m.factors["chunks"], m.repeat) != (4, 4)]
    row = compare([*kept, spoilt]).rows[1]
    assert (row.windows, row.invalid_windows) == (4, 1)
    assert row.time_ratio.high < 1.0
    assert row.energy_bound_j == 0.1 and row.throttle_reasons["sw_power_cap"] == pytest.approx(0.4)
    assert compare([*kept, spoilt]).sentences[0].endswith("Only 4 repeats: take none of this as settled.")


def test_few_repeats_are_no_ground_for_a_conclusion():
    assert (
        compare(run({1: 1.0, 4: 0.9}, repeats=2)).sentences[0].endswith("Only 2 repeats: take none of this as settled.")
    )


def test_the_sentence_says_how_well_joules_are_known():
    assert "(each window's joules are known to 11.0%)" in compare(run({1: 1.0, 4: 0.9})).sentences[0].replace(
        "10.9%", "11.0%"
    )


def test_no_ratio_is_formed_across_an_interruption():
    """The device may have been another one, or colder."""
    whole = run({1: 1.0, 4: 0.9})
    split = [dataclasses.replace(m, piece=1 if (m.repeat, m.factors["chunks"]) >= (2, 4) else 0) for m in whole]
    assert len(ratios(whole, "random, 4", "random, 1")) == 5
    assert len(ratios(split, "random, 4", "random, 1")) == 4


def test_without_one_chunk_there_is_nothing_to_compare_with():
    found = compare(run({2: 1.0, 4: 0.9}))
    assert found.rows[0].time_ratio is None and "no conclusion" in found.sentences[0]


def test_the_pair_that_figures_show():
    found = compare(run({1: 1.0, 4: 0.9, 16: 0.95}) + run({1: 0.5, 4: 0.4}, inputs="zero"))
    assert verdict.pair_to_show(found) == {"1-chunk": "random, 1", "best": "random, 4"}
    assert verdict.pair_to_show(compare(run({1: 1.0}))) == {"1-chunk": "random, 1", "best": None}


def test_the_papers_figures_are_labelled_as_the_papers():
    assert "not measured here" in verdict.PAPER["label"]
