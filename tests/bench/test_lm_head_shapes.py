"""The LM-head benchmark at several shapes: flags, what each shape is given, the common table and figure."""

import dataclasses
import json

import pytest

from jaxchunk import plotting
from jaxchunk.bench import lm_head_shapes
from jaxchunk.bench.lm_head_shapes import Shape, ShapesConfig, parse_shape
from jaxchunk.errors import InputError, RunFailedError


def interval(median):
    return {"median": median, "low": 0.99 * median, "high": 1.02 * median}


def row(variant, time, energy, *, is_peer=False, one_chunk=None):
    errors = {case: {"loss": 1e-6, "d_hidden": 1.7e-3, "d_weight": 9e-4} for case in ("random", "confident")}
    return {
        "variant": variant,
        "is_peer": is_peer,
        "temporary_bytes": 3_700_000_000,
        "time_s": interval(0.08 * time),
        "energy_j": energy and interval(57 * energy),
        "power_w": energy and interval(700.0),
        "time_over_floor": interval(time),
        "energy_over_floor": energy and interval(energy),
        "time_over_autodiff": None,
        "time_over_plain": None,
        "time_over_one_chunk": one_chunk and interval(one_chunk),
        "energy_over_one_chunk": None,
        "errors": None if variant == "GEMM floor" else errors,
        "d_weight_dtype": None if variant == "GEMM floor" else "float32",
    }


def write_run(path, *rows, **config):
    path.mkdir(parents=True)
    sizes = {"tokens": 64, "width": 16, "vocab": 97, "dtype": "bfloat16", "peers": ["all"]}
    (path / "config.json").write_text(json.dumps(sizes | config))
    (path / "summary.json").write_text(json.dumps(rows))


ROWS = (
    row("GEMM floor", 1.0, 1.0),
    row("autodiff", 1.3, 1.25),
    row("pallas, 16 chunks", 1.2, 1.21, one_chunk=1.01),
    row("QuACK 0.6.5", 1.1, 1.05, is_peer=True),
)


def test_shapes_are_read_from_their_flag():
    shapes = [parse_shape(text) for text in ShapesConfig().shapes]
    assert shapes[0] == Shape(65536, 896, 151936, (1, 8, 16))
    assert [shape.name for shape in shapes] == ["65536x896x151936", "16384x4096x128256", "8192x3584x152064"]


@pytest.mark.parametrize("text", ["65536x896", "65536x896x151936", "1x2x3:", "1x2x3:4,", "axbxc:1"])
def test_a_shape_that_is_none_is_named(text):
    with pytest.raises(InputError, match=r"--shapes has .*; write tokens x width x vocabulary : chunks"):
        parse_shape(text)


def test_a_shape_is_given_once():
    with pytest.raises(InputError, match="--shapes is 1x2x3:4 1x2x3:5; give each shape once"):
        lm_head_shapes.run(ShapesConfig(shapes=("1x2x3:4", "1x2x3:5")))


def test_the_default_shapes_are_not_begun_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(lm_head_shapes, "all_devices", list)
    with pytest.raises(InputError, match=r"the default --shapes take tens of GB, and NVML lists no GPU here"):
        lm_head_shapes.run(ShapesConfig(out_dir=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_one_table_and_one_figure(tmp_path):
    write_run(tmp_path / "64x16x97", *ROWS)
    write_run(tmp_path / "32x16x96", *ROWS[:2], vocab=96)
    (tmp_path / "shapes.json").write_text(json.dumps(["64x16x97", "32x16x96", "8x8x8"]))
    text = lm_head_shapes.report(tmp_path)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 6 and lines[-1].startswith("| 32x16x96 | autodiff | 104.00 | 1.300 (1.287 to 1.326) |")
    assert (
        "| 64x16x97 | pallas, 16 chunks |" in text and "| 1.010, null | float32 | 1.0e-06, 1.7e-03, 9.0e-04 |" in text
    )
    assert (tmp_path / "shapes.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_yet(tmp_path):
    (tmp_path / "shapes.json").write_text('["8x8x8"]')
    assert lm_head_shapes.report(tmp_path) == f"nothing is measured yet: {tmp_path}"


def test_no_floor_no_figure(tmp_path):
    without = {"time_over_floor": None, "energy_over_floor": None}
    write_run(tmp_path / "64x16x97", ROWS[1] | without)
    (tmp_path / "shapes.json").write_text('["64x16x97"]')
    assert "figure: none" in lm_head_shapes.report(tmp_path)
    plotting.plot_lm_head(tmp_path / "64x16x97")  # milliseconds then


def test_bars_are_multiples_of_the_floor_fastest_first(tmp_path, monkeypatch):
    drawn = []
    make = plotting.lm_head.new_figure
    monkeypatch.setattr(plotting.lm_head, "new_figure", lambda *size: drawn.append(make(*size)) or drawn[-1])
    write_run(tmp_path / "run", *ROWS)
    assert plotting.plot_lm_head(tmp_path / "run") == tmp_path / "run" / "lm_head.png"
    time, energy = drawn[0].axes
    assert [text.get_text() for text in time.get_yticklabels()] == ["QuACK 0.6.5", "pallas, 16 chunks", "autodiff"]
    assert [bar.get_width() for bar in time.patches] == [1.1, 1.2, 1.3]
    assert [bar.get_width() for bar in energy.patches] == [1.05, 1.21, 1.25]
    assert len({bar.get_facecolor() for bar in time.patches}) == 3
    assert time.get_xlabel() == "time / GEMM floor" and time.get_xlim()[0] == 0
    assert [text.get_text() for text in energy.get_legend().get_texts()] == [
        "jaxchunk",
        "peers",
        "XLA, all logits at once",
    ]


def test_energy_that_is_not_known_has_no_panel(tmp_path):
    write_run(tmp_path / "run", *(row(r["variant"], 1.5, None) for r in ROWS))
    assert plotting.plot_lm_head(tmp_path / "run").exists()


def test_what_every_shape_is_asked(tmp_path, monkeypatch, capsys):
    asked = []

    def run_child(command):
        asked.append(command[2:])
        if "32" in command:
            return 1
        write_run(tmp_path / "out" / "64x16x97", *ROWS)
        return 0

    def interrupted(command):
        asked.append(command[2:])
        raise KeyboardInterrupt

    monkeypatch.setattr(lm_head_shapes, "run_child", run_child)
    config = ShapesConfig(shapes=("32x16x97:1,2", "64x16x97:1"), peers=("liger",), out_dir=str(tmp_path / "out"))
    with pytest.raises(RunFailedError, match=r"failed: 32x16x97; --continue --out_dir .*out tries again"):
        lm_head_shapes.run(config)
    assert asked[0][:9] == ["--tokens", "32", "--width", "16", "--vocab", "97", "--chunks", "1", "2"]
    assert asked[0][-2:] == ["--out_dir", str(tmp_path / "out" / "32x16x97")]
    assert " ".join(asked[1]).find("--peers liger --out_dir") > 0 and "--continue" not in asked[1]
    assert "| 64x16x97 | QuACK 0.6.5 |" in capsys.readouterr().out
    monkeypatch.setattr(lm_head_shapes, "run_child", interrupted)
    flags = {"go_on": True, "implementations": ("xla",), "dtype": "bfloat16", "window_s": 2.0, "peers": ()}
    with pytest.raises(KeyboardInterrupt):
        lm_head_shapes.run(dataclasses.replace(config, shapes=("32x16x97:1",), **flags))
    assert (
        f"interrupted: go on with the same flags and --continue --out_dir {tmp_path / 'out'}" in capsys.readouterr().out
    )
    words = " ".join(asked[-1])
    assert "--implementations xla --dtype bfloat16 --window_s 2.0 --continue" in words and "--peers" not in words
