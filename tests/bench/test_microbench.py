"""The microbenchmark's flags, its variants, and what it writes on a machine without a GPU."""

import dataclasses
import json
import math
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.bench import microbench, microbench_config
from jaxchunk.bench.microbench_config import MicrobenchConfig
from jaxchunk.errors import InputError
from jaxchunk.telemetry.wall_meter import WallMeter

CONFIG = MicrobenchConfig(m=64, k=16, n=96, chunks=(1, 4), iters=2, warmup=1, repeats=2, settle_s=0.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"chunks": (4, 0)}, "--chunks is 4 0; give counts from 1 to --m, 64"),
        ({"chunks": (65,)}, "--chunks is 65; give counts from 1 to --m, 64"),
        ({"inputs": ("random", "ones")}, "--inputs is random ones; choose from random, zero"),
        ({"inputs": ()}, "--inputs is empty"),
        ({"dtype": "int8"}, "--dtype is int8"),
        ({"workload": "mlp"}, "--workload is mlp; choose from softmax, lm_head"),
        ({"softmax": ("liger",)}, "--softmax is liger; choose from pallas, xla"),
        ({"softmax": ("pallas",)}, "--softmax: implementation='pallas' cannot run"),
        ({"k": 0}, "--k is 0; it must be at least 1"),
        ({"iters": 0}, "--iters is 0"),
        ({"warmup": -1}, "--warmup is -1"),
        ({"wall_meter": "/nowhere/at/all.csv"}, "--wall_meter is /nowhere/at/all.csv"),
    ],
)
def test_bad_flags_are_named(change, words):
    with pytest.raises(InputError, match=words):
        microbench_config.validate(dataclasses.replace(CONFIG, **change))


def test_what_does_not_fit_is_said_before_anything_is_compiled():
    paper = dataclasses.replace(microbench_config.default_config("gpu"), chunks=(1,))
    assert (paper.m, paper.k, paper.n) == (32768, 2048, 131072)
    with pytest.raises(InputError, match=r"needs about 10\.3 GB at 1 chunk, and 7\.5 GB can be used; --n 65536 would"):
        microbench_config.check_memory(paper, int(8e9))
    # A and B of one kind of inputs at a time, accumulator, a chunk's logits and its rows of A.
    exact = 2 * (32768 + 131072) * 2048 + 4 * 2048 * 131072 + 2 * 2048 * (131072 + 2048)
    sixteen = dataclasses.replace(paper, chunks=(16,))
    assert exact < 2.3e9
    microbench_config.check_memory(sixteen, math.ceil(exact / 0.94) + 1)
    with pytest.raises(InputError, match="at 16 chunks"):
        microbench_config.check_memory(sixteen, math.floor(exact / 0.94) - 1)
    with pytest.raises(InputError, match="use a smaller --m as well"):
        microbench_config.check_memory(paper, int(1e6))


@pytest.mark.parametrize("workload", ["softmax", "lm_head"])
def test_variants_differ_in_chunks_and_inputs_only(workload):
    programs = microbench.Programs(dataclasses.replace(CONFIG, workload=workload))
    variants = {variant.name: variant for variant in programs.variants()}
    assert list(variants) == ["random, 1 chunk", "zero, 1 chunk", "random, 4 chunks", "zero, 4 chunks"]
    assert variants["zero, 4 chunks"].factors == {"inputs": "zero", "chunks": 4, "softmax": "xla"}
    one, four = (variants[f"random, {n}"].call()[1] for n in ("1 chunk", "4 chunks"))
    for a, b in zip(one if workload == "lm_head" else [one], four if workload == "lm_head" else [four], strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
    assert {name: facts["chunks_in_hlo"] for name, facts in programs._facts.items()} == {
        name: variant.factors["chunks"] for name, variant in variants.items()
    }


def test_where_one_chunk_alone_does_not_fit_that_is_said_and_the_others_run(caplog):
    paper = microbench_config.default_config("gpu")
    microbench_config.check_memory(paper, int(8e9))
    (record,) = caplog.records
    assert "at 1 chunk, and 7.5 GB can be used; --n 65536 would fit" in record.getMessage()
    caplog.clear()
    microbench_config.check_memory(paper, int(24e9))
    assert not caplog.records


def test_one_kind_of_operands_is_held_at_a_time(monkeypatch):
    """A call finds its own operands whatever was measured before, to the same bits; they are made before the window."""
    made = []
    monkeypatch.setattr(microbench._Operands, "_made", lambda self, inputs: made.append(inputs) or (jnp.ones(3),))
    operands = microbench._Operands(CONFIG)
    first = weakref.ref(operands.of("random")[0])
    operands.of("random")
    operands.of("zero")
    assert made == ["random", "zero"] and first() is None
    monkeypatch.undo()
    variants = {variant.name: variant for variant in microbench.Programs(CONFIG).variants()}
    before = variants["random, 4 chunks"].call()[1]
    variants["zero, 4 chunks"].prepare()
    assert not jnp.any(variants["zero, 1 chunk"].call()[1])
    np.testing.assert_array_equal(variants["random, 4 chunks"].call()[1], before)


def test_quick_measures_less():
    quick = microbench_config.quickened(microbench_config.default_config("gpu"))
    assert quick.chunks == (1, 4, 16) and quick.inputs == ("random",) and quick.repeats == 5
    protocol = microbench_config.protocol_of(dataclasses.replace(quick, quick=True))
    assert (protocol.calls, protocol.window_s, protocol.warmup_calls) == (None, 2.0, 3)
    protocol = microbench_config.protocol_of(microbench_config.default_config("gpu"))
    assert (protocol.calls, protocol.warmup_calls, protocol.temperature_tolerance_c) == (100, 10, 2.0)


@pytest.mark.parametrize(
    ("given", "measured"), [((1, 2, 8), (1, 2, 8)), ((1, 64), (1, 64)), ((1, 2, 8, 32), (1, 2, 8))]
)
def test_quick_keeps_the_counts_that_were_asked_for(given, measured):
    assert microbench_config.quickened(dataclasses.replace(CONFIG, chunks=given)).chunks == measured


def wall_csv(path, start_unix_s, seconds):
    rows = [f"{start_unix_s + 0.5 * i:.3f},{100 + i % 3}" for i in range(int(seconds * 2))]
    path.write_text("timestamp,watts\n" + "\n".join(rows) + "\n")


def test_one_chunk_count_alone_still_has_its_figures(tmp_path):
    microbench.run(dataclasses.replace(CONFIG, chunks=(1,), inputs=("random",), out_dir=str(tmp_path / "run")))
    assert (tmp_path / "run" / "throughput.png").exists()


def test_a_run_without_a_gpu_has_null_energy_and_its_reason(tmp_path, capsys):
    config = dataclasses.replace(CONFIG, out_dir=str(tmp_path / "run"))
    microbench.run(config)
    said = capsys.readouterr().out
    assert "energy is unknown (JAX runs on cpu: no GPU to measure)" in said and "| null |" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["rows"]) == 4 and len(summary["sentences"]) == 2
    assert "not measured here" in summary["paper"]["label"]
    assert summary["peak_memory_bytes"] is None  # a CPU's allocator does not say
    page = (tmp_path / "run" / "table.md").read_text()
    assert summary["sentences"][0] in page and "not measured here" in page and "DGX Spark, random inputs: " in page
    row = summary["rows"][1]
    assert row["chunks"] == 4 and row["facts"]["chunks_in_hlo"] == 4 and row["facts"]["softmax_in_hlo"]
    assert row["energy_j"] is None and row["energy_null_reason"] == "JAX runs on cpu: no GPU to measure"
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"throughput.png", "period.png", "table.md", "records.jsonl", "env.json", "config.json"} <= names
    assert "power.png" not in names and not any(name.startswith("timeline") for name in names)

    # A wall meter can be set beside the run afterwards.
    began_s = json.loads((tmp_path / "run" / "run.json").read_text())["began_unix_s"]
    wall_csv(tmp_path / "wall.csv", began_s - 10, 120)
    microbench.run(dataclasses.replace(config, go_on=True, wall_meter=str(tmp_path / "wall.csv")))
    wall = json.loads((tmp_path / "run" / "wall.json").read_text())
    assert wall["lag"]["lag_s"] is None and "is not known" in capsys.readouterr().out
    wall = wall["windows"]
    assert len(wall) == 8 and all(w["gpu_j"] is None and w["wall"]["energy_j"] > 0 for w in wall)
    wall_csv(tmp_path / "early.csv", began_s - 1000, 60)
    with pytest.raises(InputError, match=r"the log ends .* before the window starts"):
        microbench.run(dataclasses.replace(config, go_on=True, wall_meter=str(tmp_path / "early.csv")))


def test_a_wall_meter_whose_clock_is_off_is_found_out(tmp_path):
    zero_unix_s, times_s = 1.7e9, np.arange(0.0, 120.0, 0.1)
    power_w = np.where((times_s // 15) % 2 == 1, 400.0, 100.0) + np.where(times_s > 70, 150.0, 0.0)
    rows = [f"{t:.3f},{'' if i == 5 else w},1500,60,1" for i, (t, w) in enumerate(zip(times_s, power_w, strict=True))]
    (tmp_path / "telemetry.csv").write_text(
        "\n".join(["time_s,power_w,sm_clock_mhz,temperature_c,total_energy_j", *rows])
    )
    meter = WallMeter(zero_unix_s + times_s[::5] + 2.0, 50.0 + power_w[::5])
    assert microbench._lag_of(meter, tmp_path / "telemetry.csv", zero_unix_s).lag_s == pytest.approx(2.0, abs=0.3)
