"""The choice beside an exhaustive sweep: flags, one run on a CPU, what the table says."""

import dataclasses
import json

import pytest

from jaxchunk.bench import chunk_sweep
from jaxchunk.bench.chunk_sweep import ChunkSweepConfig
from jaxchunk.errors import InputError

CONFIG = ChunkSweepConfig(
    shapes=("512x8x64",), candidates=(1, 2), budget_s=0.2, window_s=0.01, repeats=2, settle_s=0.0, sweep=True
)


def test_a_sweep_has_the_choice_in_table_and_figure_and_can_go_on(tmp_path, capsys, monkeypatch):
    config = dataclasses.replace(CONFIG, out_dir=str(tmp_path / "run"))
    path = chunk_sweep.run(config)
    (row,) = json.loads((path / "summary.json").read_text())
    assert row["chosen"] in (1, 2) and row["best"] in (1, 2) and set(row["sweep_over_best"]) == {"1", "2"}
    assert row["chosen_over_best"] == row["sweep_over_best"][str(row["chosen"])]
    assert row["sweep_over_best"][str(row["best"])]["median"] == 1.0
    assert (path / "table.md").read_text().splitlines()[2].startswith(f"| 512x8x64 | time | {row['chosen']} |")
    assert (path / "chunk_sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "choosing ..." in capsys.readouterr().out

    def not_again(*_):
        raise AssertionError("it is measured")

    monkeypatch.setattr(chunk_sweep.lm_head, "run", not_again)
    chunk_sweep.run(dataclasses.replace(config, go_on=True))
    assert json.loads((path / "summary.json").read_text()) == [row]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shapes": ("512x8",)}, "give tokens x width x vocabulary, each once"),
        ({"shapes": ("8x8x8", "8x8x8")}, "each once"),
        ({"objectives": ()}, "--objectives is empty"),
        ({"objectives": ("time", "energy")}, "there is no source of it .JAX runs on cpu"),
    ],
)
def test_flags_out_of_their_domain(changes, said):
    with pytest.raises(InputError, match=said):
        chunk_sweep.run(dataclasses.replace(CONFIG, **changes))
