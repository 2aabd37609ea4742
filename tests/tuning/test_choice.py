"""Choosing by measuring: what is compared, what is refused, what is kept."""

import dataclasses
import json
import logging
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plant_rig import Rig

from jaxchunk.errors import InputError
from jaxchunk.telemetry.simulation.profiles import H200
from jaxchunk.tuning import ChunkChoice, choice, choose_num_chunks, contest
from jaxchunk.tuning.race import Rules

HIDDEN, WEIGHT = jax.ShapeDtypeStruct((512, 8), jnp.float32), jax.ShapeDtypeStruct((64, 8), jnp.float32)


@pytest.fixture
def choose(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxchunk")

    def choose(**options):
        defaults = {"candidates": (1, 2), "budget_s": 0.3, "cache_dir": tmp_path}
        return choose_num_chunks(HIDDEN, WEIGHT, **defaults | options)

    return choose


def test_a_choice_has_its_numbers_and_is_kept(choose, tmp_path, caplog):
    first = choose()
    assert first.num_chunks in (1, 2) and not first.cached and first.implementation == "xla"
    assert [c.num_chunks for c in first.candidates] == [1, 2]
    assert all(c.windows > 0 and c.time_s > 0 and c.energy_j is None for c in first.candidates)
    assert first.candidates[1].temporary_bytes < first.candidates[0].temporary_bytes
    assert f"**{first.num_chunks}**" in first.table()
    assert "measuring 1, 2 chunks for at most 0 s" in caplog.text
    assert choose() == dataclasses.replace(first, cached=True)
    assert ChunkChoice.from_dict(json.loads(json.dumps(first.as_dict()))) == first
    assert len(list((tmp_path / "chunk-choices").iterdir())) == 1
    choose(label_smoothing=0.1)  # other circumstances
    assert len(list((tmp_path / "chunk-choices").iterdir())) == 2


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[: len(text) // 2], "cannot be used (JSONDecodeError"),
        (lambda text: "[]", "cannot be used (TypeError"),
        (lambda text: text.replace('"num_chunks"', '"chunks"'), "cannot be used (KeyError"),
        (lambda text: text.replace('"jaxchunk": "', '"jaxchunk": "0.0-'), "is of another version or device"),
    ],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_word(choose, tmp_path, caplog, damage, said):
    choose()
    (file,) = (tmp_path / "chunk-choices").iterdir()
    file.write_text(damage(file.read_text()))
    assert not choose().cached
    assert said in caplog.text
    assert choose().cached


def test_a_stop_ends_it_between_two_calls_and_keeps_nothing(choose, tmp_path, monkeypatch):
    measure, before, after = contest.measure, signal.getsignal(signal.SIGINT), []

    def interrupted(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        after.append("here")
        return measure(*arguments, **options)

    monkeypatch.setattr(contest, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        choose()
    assert after == ["here"] and not (tmp_path / "chunk-choices").exists()
    assert signal.getsignal(signal.SIGINT) == before


def test_a_memory_budget_drops_candidates_or_is_refused(choose, caplog):
    needs = {c.num_chunks: c.temporary_bytes for c in choose().candidates}
    only = choose(memory_budget_bytes=needs[2])
    assert (only.num_chunks, only.reason) == (2, "the only candidate")
    assert "exceed the memory budget" in only.dropped["1"] and "1 chunk(s) are left out" in caplog.text
    with pytest.raises(InputError, match=r"no candidate fits in the memory budget of .* 2 chunks, needs .* allow that"):
        choose(memory_budget_bytes=10)


def test_a_candidate_that_does_not_compile_is_dropped_with_a_word(choose, monkeypatch, caplog):
    loss = choice.lm_head_loss

    def broken(*operands, num_chunks, **options):
        if num_chunks == 2:
            raise jax.errors.JaxRuntimeError("INTERNAL: no such tile\nand more")
        return loss(*operands, num_chunks=num_chunks, **options)

    monkeypatch.setattr(choice, "lm_head_loss", broken)
    assert choose().dropped == {"2": "JaxRuntimeError: INTERNAL: no such tile"}
    assert "2 chunk(s) are left out: JaxRuntimeError" in caplog.text
    with pytest.raises(InputError, match=r"no candidate can run; 2 chunk\(s\): JaxRuntimeError"):
        choose(candidates=(2,))


@pytest.mark.parametrize(("frozen", "gemms"), [(False, 3), (True, 2)])
def test_a_frozen_weight_has_no_gradient_to_measure(choose, monkeypatch, frozen, gemms):
    lowered, compiled = [], choice._compiled

    def compile_seen(jitted, *operands):
        lowered.append(jitted.lower(*operands).as_text())
        return compiled(jitted, *operands)

    monkeypatch.setattr(choice, "_compiled", compile_seen)
    assert not choose(frozen_weight=frozen).cached
    assert [text.count("stablehlo.dot_general") for text in lowered] == [gemms, gemms]
    assert not choose(frozen_weight=not frozen).cached  # another question


def test_no_energy_is_refused_unless_time_will_do(choose, caplog):
    with pytest.raises(InputError, match=r"needs energy, and there is no source of it here \(JAX runs on cpu"):
        choose(objective="energy")
    assert choose(objective="edp", time_if_no_energy=True).objective == "time"
    assert "no energy here" in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "power"}, "objective is 'power'"),
        ({"candidates": (0, 1)}, "give chunk counts of at least 1"),
        ({"candidates": ()}, "give chunk counts of at least 1"),
        ({"budget_s": 0.0}, "budget_s is 0"),
        ({"memory_budget_bytes": -1}, "must not be negative"),
        ({"implementation": "pallas"}, "implementation='pallas' cannot run"),
        ({"bias": jnp.zeros(64)}, "bias: options that are arrays"),
        ({"label_smoothing": 3.0}, "no candidate can run; 1 chunk.*label_smoothing"),
    ],
)
def test_what_cannot_be_chosen_from(choose, options, said):
    with pytest.raises(InputError, match=said):
        choose(**options)


def test_the_unchunked_reference_has_one_candidate(choose):
    assert choose(implementation="reference").num_chunks == 1


@pytest.mark.parametrize("objective", ["time", "energy", "edp"])
def test_on_a_simulated_gpu_the_best_is_found_within_the_budget(monkeypatch, objective):
    """Work of known joules; windows of energy end at ticks of the counter."""
    rig = Rig(monkeypatch, H200)
    work = {1: 1.0, 2: 0.97, 4: 1.0}  # activities: the fewer watts, at a power cap, the faster too
    variants = {n: rig.variant(n, activity) for n, activity in work.items()}
    began_s = rig.clock()
    held = contest.hold(variants, rig.monitor, objective, budget_s=40.0, rules=Rules(), say=lambda _: None)
    assert held.standing.active == (2,) and held.standing.leader == 2
    assert rig.clock() - began_s < 40.0 and held.seconds < 40.0
    assert len({m.repeat for m in held.measurements}) > 3
    zero_s = rig.monitor.start_s
    for m in held.measurements:
        true_j = rig.device.true_energy_j(zero_s + m.start_s, zero_s + m.end_s) / m.calls
        assert m.energy_j is None or m.energy_j == pytest.approx(true_j, rel=0.03)


def test_the_budget_is_kept_where_nothing_can_be_told_apart(monkeypatch):
    rig = Rig(monkeypatch, dataclasses.replace(H200, activity_noise=0.1))
    variants = {n: rig.variant(n) for n in (1, 2, 4)}
    held = contest.hold(variants, rig.monitor, "energy", budget_s=12.0, rules=Rules(tolerance=1e-6), say=lambda _: None)
    assert not held.standing.finished and 6.0 < held.seconds < 12.0
    assert np.isfinite([m.time_s for m in held.measurements]).all()
