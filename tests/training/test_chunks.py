"""A chunk count that is left open: what is chosen, written down and kept by a run that goes on."""

import dataclasses
import json
from pathlib import Path

import pytest

from jaxchunk.errors import InputError
from jaxchunk.training import chunks, loop
from jaxchunk.training.checkpoint import load_params
from jaxchunk.training.config import TrainConfig, validate
from jaxchunk.tuning import ChunkChoice


@pytest.fixture
def auto(config):
    return dataclasses.replace(
        config, lmhead_chunks="auto", chunk_candidates=(1, 4), chunk_budget_s=0.2, steps=2, checkpoint_every=0
    )


def test_auto_is_settled_before_training_and_kept_by_a_run_that_goes_on(auto, monkeypatch, capsys):
    loop.train(auto)
    path = Path(auto.out_dir)
    chosen = json.loads((path / "env.json").read_text())["chosen"]
    choice = ChunkChoice.from_dict(chosen["lmhead_chunks_choice"])
    assert choice.num_chunks == chosen["lmhead_chunks"] in (1, 4) and choice.num_tokens == 64
    assert json.loads((path / "config.json").read_text())["lmhead_chunks"] == choice.num_chunks
    assert f"chunks  {choice.num_chunks}, measured in " in capsys.readouterr().out
    assert load_params(path).config.lmhead_chunks == choice.num_chunks

    def not_again(*_, **__):
        raise AssertionError("it is settled")

    monkeypatch.setattr(chunks, "choose_num_chunks", not_again)
    assert loop.train(dataclasses.replace(auto, resume=True, steps=3))["steps"] == 3


def test_energy_is_refused_where_there_is_none(auto):
    with pytest.raises(InputError, match="no source of it here"):
        loop.train(dataclasses.replace(auto, chunk_objective="energy"))
    assert not Path(auto.out_dir).exists()


def test_the_head_may_have_what_the_rest_leaves(auto, monkeypatch):
    asked = {}

    def choose(hidden, weight, **options):
        asked.update(options, hidden=hidden.shape)
        return ChunkChoice(4, "", "time", 64, "xla", (), {}, 0.0)

    monkeypatch.setattr(chunks, "choose_num_chunks", choose)
    model = chunks.qwen2.SIZES["tiny"]
    for limit_bytes, config, expected in [
        (None, auto, None),
        (10**9, auto, pytest.approx(0.94e9, rel=0.1)),
        (10**9, dataclasses.replace(auto, chunk_memory_gb=0.5), 5 * 10**8),
    ]:
        settled, _ = chunks.settle(config, model, limit_bytes)
        assert settled.num_chunks == 4 and asked["memory_budget_bytes"] == expected
        assert asked["hidden"] == (4, 16, 32)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lmhead_chunks": 0}, "--lmhead_chunks is 0; it must be at least 1, auto or adaptive"),
        ({"chunk_candidates": (4, 0)}, "--chunk_candidates is 4 0"),
        ({"chunk_memory_gb": 0.0}, "--chunk_memory_gb is 0"),
        ({"chunk_budget_s": -1.0}, "--chunk_budget_s is -1"),
    ],
)
def test_flags_out_of_their_domain(changes, said):
    with pytest.raises(InputError, match=said):
        validate(dataclasses.replace(TrainConfig(), **changes))
