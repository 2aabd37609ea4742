"""scripts/simulate.py: what it writes is complete, marked as simulated, and made for a device of one's own as well."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxchunk.errors import InputError
from jaxchunk.run_dir import read_json_lines
from jaxchunk.simulation import report
from jaxchunk.simulation.report import SimulationConfig

SCRIPT = Path(__file__).parents[2] / "scripts" / "simulate.py"
OWN = """
base = "h200"
[profile]
name = "mine"
[profile.thermal]
time_constant_s = 0.5
"""


def test_a_run_for_a_device_in_a_file(tmp_path, capsys):
    device = tmp_path / "mine.toml"
    device.write_text(OWN)
    config = SimulationConfig(
        device=str(device), out_dir=str(tmp_path / "run"), chunks=(4,), training_chunks=(2,), measured_s=1.0, repeats=2
    )
    report.run(config)
    path = tmp_path / "run"
    names = {"config.json", "env.json", "run.json", "records.jsonl", "summary.json", "table.md", "simulation.png"}
    assert names <= {entry.name for entry in path.iterdir()}
    records = read_json_lines(path / "records.jsonl")
    cases = {(r["workload"], r["inputs"], r["chunks"], r["seed"]) for r in records}
    assert len(cases) == len(records) == 2 * 6 and all(record["simulation"] is True for record in records)
    summary = json.loads((path / "summary.json").read_text())
    assert summary["simulation"].startswith("SIMULATION") and summary["device"] == "mine"
    assert summary["measured"] == [] and summary["fit"] is None
    assert [sweep["name"] for sweep in summary["sweeps"]] == ["period", "power_ratio", "distance"]
    assert all(point["gain"] > 0 for sweep in summary["sweeps"] for point in sweep["points"])
    assert summary["parameters"]["profile"]["thermal"]["time_constant_s"] == 0.5
    assert "Simulation of mine" in (path / "table.md").read_text()
    assert "Simulation of mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"chunks": (0,)}, "--chunks is 0; it must be 1 or more"),
        ({"compare_chunks": 0}, "--compare_chunks is 0; it must be 1 or more"),
        ({"repeats": 0}, "--repeats is 0; it must be at least 1"),
        ({"measured_s": 0.0}, "--measured_s is 0.0; it must be above 0"),
        ({"seed": -1}, "--seed is -1"),
        ({"go_on": True, "out_dir": "x"}, "--continue is not for simulations"),
    ],
)
def test_flags_that_cannot_be(flags, words):
    with pytest.raises(InputError) as error:
        report.check(SimulationConfig(device="gb10", **flags))
    assert words in str(error.value)


def test_the_script_says_what_it_does_not_know():
    done = subprocess.run([sys.executable, SCRIPT, "--device", "b200"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: device b200 is neither one of gb10, l40s, h200 nor a file"
