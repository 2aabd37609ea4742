"""The report for devices that we do not have: every stage, whatever becomes of the others; again where it broke off."""

import sys
import tarfile

import pytest

from jaxchunk.bench import device_report
from jaxchunk.bench.device_report import DeviceReportConfig, Stage
from jaxchunk.errors import InputError, RunFailedError

BENCHMARK = """
import json, pathlib, sys
flags = sys.argv[1:]
path = pathlib.Path(flags[flags.index("--out_dir") + 1])
first = not path.exists()
assert ("--continue" in flags) == (not first)
path.mkdir(parents=True, exist_ok=True)
(path / ".jaxchunk-run").touch()
if first and "fail" in flags:
    sys.exit(3)
(path / "table.md").write_text("| a | b |")
(path / "warnings.jsonl").write_text(json.dumps({"warning": "it is hot"}) + "\\n")
(path / "env.json").write_text(json.dumps({"device_kind": "NVIDIA Test"}))
(path / "figure.png").write_bytes(b"png")
print("measured", flags)
"""


def stages(*flags):
    doctor = Stage("doctor", "What can be measured", ("-c", "print('all is well')"), is_benchmark=False)
    return [doctor, Stage("bench", "A benchmark", ("-c", BENCHMARK, *flags))]


def test_one_directory_one_page_one_archive(tmp_path, capsys):
    page = device_report.run(DeviceReportConfig(out_dir=str(tmp_path / "report")), stages())
    text = page.read_text()
    for part in ("NVIDIA Test", "all is well", "| a | b |", "- warning: it is hot", "![figure](bench/figure.png)"):
        assert part in text
    assert "[2/2] A benchmark ..." in capsys.readouterr().out
    with tarfile.open(tmp_path / "report.tar.gz") as archive:
        assert {"report/summary.md", "report/bench/figure.png", "report/bench.log"} <= set(archive.getnames())


def test_a_stage_that_fails_is_in_the_report_and_retried(tmp_path, capsys):
    config = DeviceReportConfig(out_dir=str(tmp_path / "report"), archive=False)
    with pytest.raises(RunFailedError, match="failed: bench"):
        device_report.run(config, stages("fail"))
    assert "Failed with status 3" in (tmp_path / "report" / "summary.md").read_text()
    capsys.readouterr()
    page = device_report.run(config, stages("fail"))  # goes on with what the stage had begun
    said = capsys.readouterr().out
    assert "[1/2]" not in said and "[2/2]" in said
    assert "Failed" not in page.read_text()


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(stage, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(device_report, "_run_stage", interrupt)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        device_report.run(DeviceReportConfig(out_dir="report"), stages())
    assert f"go on with the same flags and --out_dir {tmp_path / 'report'}" in capsys.readouterr().out


def test_the_current_directory_serves(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    device_report.run(DeviceReportConfig(out_dir="."), stages())
    assert (tmp_path / "here.tar.gz").exists()


def test_a_directory_with_another_report_is_refused(tmp_path):
    config = DeviceReportConfig(out_dir=str(tmp_path / "report"), archive=False)
    device_report.run(config, stages())
    with pytest.raises(InputError, match="holds another report"):
        device_report.run(DeviceReportConfig(out_dir=str(tmp_path / "report"), quick=True), stages())


def test_the_default_stages_are_scripts_that_are_there():
    for quick in (True, False):
        for stage in device_report.default_stages(quick):
            assert stage.command[0] == "-m" or device_report.Path(stage.command[0]).exists()
    assert sys.executable
