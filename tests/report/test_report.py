"""The page and the table from the records of tiny runs: finished with energy, without, killed."""

import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxchunk.errors import InputError
from jaxchunk.report import comparison_table, read_runs, write_report
from jaxchunk.report.figures import binned, thinned
from jaxchunk.report.page import html_page
from jaxchunk.run_dir import RunDirectory
from jaxchunk.telemetry import THROTTLE_REASONS
from jaxchunk.training.records import Spread, StepRecord, Stretch, summarize

TOKENS, STEP_S, JOULES = 1000, 0.5, 4.321
NO_GPU = "no GPU to measure <here>"


def records(count, energy):
    measured = {
        "energy_j": JOULES, "energy_bound_j": 0.1, "energy_per_token_j": JOULES / TOKENS,
        "energy_source": "nvml_total_energy", "energy_null_reason": None, "power_w": 700.0, "sm_clock_mhz": 1500.0,
        "temperature_c": 61.0, "throttle": dict.fromkeys(THROTTLE_REASONS, 0.0) | {"sw_power_cap": 0.25},
    }  # fmt: skip
    return [
        StepRecord(
            step=step, time_s=1 + STEP_S * step, loss=9 / step, grad_norm=1.0, lr=1e-3, step_time_s=STEP_S,
            tokens_per_s=TOKENS / STEP_S, mfu=None,
            **(measured if energy else dict.fromkeys(measured) | {"energy_null_reason": NO_GPU}),
        )
        for step in range(1, count + 1)
    ]  # fmt: skip


def stretch(steps, energy):
    spread = Spread(20, 700.0, 12.0) if energy else None
    return Stretch(
        first_step=1, last_step=len(steps), start_s=1.0, end_s=1 + STEP_S * len(steps),
        energy_j=JOULES * len(steps) if energy else None, energy_bound_j=0.05 * len(steps) if energy else None,
        energy_source=None, energy_null_reason=None if energy else NO_GPU, second_energy_j=None,
        throttle=steps[0].throttle and {name: s * len(steps) for name, s in steps[0].throttle.items()},
        slow_without_reason_s=None, rails_j=None, power_w=spread, sm_clock_mhz=spread,
    )  # fmt: skip


def write_run(path, count=4, *, energy=True, stretched=None, finished=True, chunks=4):
    """As `train` writes it; `stretched`: steps in a stretch, all by default."""
    steps = records(count, energy)
    stretches = [stretch(steps[:stretched], energy)] if stretched != 0 else []
    with RunDirectory(path) as run:
        run.begin(
            {
                "model": "tiny",
                "steps": 4,
                "lr": 1e-3,
                "lmhead_chunks": chunks,
                "lmhead_impl": None,
                "out_dir": str(path),
            },
            {"jaxchunk": "9.9", "device_kind": "A <fast> device", "packages": {"jax": "0.0.1"}},
            step=0,
        )
        for record in steps:
            run.append("steps.jsonl", record.as_dict())
        for line in stretches:
            run.append("stretches.jsonl", vars(line))
        if energy:
            rows = [f"{1 + 0.1 * i},{700 + i},1500,61,{i}" for i in range(5 * count)]
            header = "time_s,power_w,sm_clock_mhz,temperature_c,total_energy_j"
            (path / "telemetry.csv").write_text("\n".join([header, *rows]) + "\n")
        if finished:
            run.append("validation.jsonl", {"step": count, "time_s": 9.0, "val_loss": 2.71828, "tokens": 5})
            outcome = {
                "status": "completed",
                "status_reason": None,
                "val_loss": 2.71828,
                "peak_memory_bytes": 5 * 10**9,
            }
            run.write_json("summary.json", outcome | summarize(steps, stretches, TOKENS))
    return path


class Page(HTMLParser):
    """Checks that what is opened is closed, and gathers references, names and the cells of tables by row and column."""

    VOID = ("meta",)

    def __init__(self, page):
        super().__init__()
        self.open, self.references, self.names, self.rows = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        assert tag != "script"
        self.names += [value for name, value in attrs if name == "id"]
        self.references += [value for name, value in attrs if name in ("href", "xlink:href", "src")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name):
        return next(row[1:] for row in self.rows if row[0] == name)


def test_the_page_is_whole_and_says_what_the_records_say(tmp_path):
    paths = [
        write_run(tmp_path / "with"),
        write_run(tmp_path / "with_out", energy=False, chunks=16),
        write_run(tmp_path / "killed", count=3, stretched=2, finished=False),
    ]
    path = write_report(read_runs(paths), tmp_path / "report.html")
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.references and all(reference.startswith("#") for reference in page.references)
    assert {reference[1:] for reference in page.references} <= set(page.names)
    assert len(page.names) == len(set(page.names))
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count(f"Not shown: with_out ({html.escape(NO_GPU)}).") == 1
    assert text.count("<svg xmlns") == text.count("<figure>") == 4

    assert page.rows[0][1:] == ["with", "with_out", "killed"]
    assert page.row("--lmhead_chunks") == ["4", "16", "4"]
    assert page.row("--model") == ["tiny"]  # the same in all
    assert "out_dir" not in text
    assert page.row("device") == ["A <fast> device"]
    assert page.row("steps") == ["4 of 4", "4 of 4", "3 of 4"]
    assert page.row("tokens/s: median (p10 to p90)") == ["2,000 (2,000 to 2,000)"] * 3
    assert page.row("mJ/token (total)") == [
        "4.321 ± 0.050", f"unknown{NO_GPU}", "4.321 ± 0.050of the first 2 steps",
    ]  # fmt: skip
    assert page.row("power, W: mean, std") == ["700, 12", f"unknown{NO_GPU}", "700, 12"]
    assert page.row("temperature, °C: highest") == ["61", f"unknown{NO_GPU}", "61"]
    assert page.row("throttled, s, by reason") == [
        "sw_power_cap 1.0 (50% of 2.0)", f"unknown{NO_GPU}", "sw_power_cap 0.5 (50% of 1.0)",
    ]  # fmt: skip
    assert page.row("peak memory, GB") == ["5.0", "5.0", "unknownit is written down at the end"]
    assert page.row("validation loss") == ["2.7183", "2.7183", "unknownthere was no validation"]
    assert [cell.split("there")[0] for cell in page.row("status")] == ["completed", "completed", "no finished run"]


def test_several_gpus_have_the_mean_power_of_their_steps():
    """Samples of each are taken at times of its own: their stretch has no power, each step has the sum."""
    steps = records(4, energy=True)
    without = dataclasses.replace(stretch(steps, energy=True), power_w=None)
    assert summarize(steps, [without], TOKENS) == summarize(steps, [stretch(steps, energy=True)], TOKENS) | {
        "power_w_mean": 700.0,
        "power_w_std": None,
    }


def test_several_gpus_are_throttled_for_a_share_of_the_time_of_all(tmp_path):
    path = write_run(tmp_path / "two", count=2, stretched=0, finished=False)
    lines = [
        json.loads(line) | {"devices": {"0": {}, "1": {}}} for line in (path / "steps.jsonl").read_text().splitlines()
    ]
    (path / "steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = Page(html_page(read_runs([path]))).row("throttled, s, by reason")
    assert row == ["sw_power_cap 0.5 (25% of 2 x 1.0)"]


def test_runs_that_got_nowhere_are_shown(tmp_path):
    before_validation = write_run(tmp_path / "early", count=2, stretched=0, finished=False)
    nothing = write_run(tmp_path / "nothing", count=1, stretched=0, finished=False)
    (nothing / "steps.jsonl").unlink()
    page = Page(html_page(read_runs([before_validation, nothing])))
    assert page.row("power, W: mean, std") == ["700mean of the steps' means", "unknownno step was completed"]
    assert page.row("mJ/token (total)")[0].startswith("unknownthe run ended before its first validation")
    assert page.row("throttled, s, by reason")[0] == "sw_power_cap 0.5 (50% of 1.0)"
    alone = html_page(read_runs([nothing]))
    assert alone.count("Unknown.") == alone.count("Not shown: nothing (no step was completed).") == 4
    assert "Unknown." not in html_page(read_runs([before_validation]))


def test_flags_of_other_versions_do_not_count_as_differences(tmp_path):
    paths = [write_run(tmp_path / "old", chunks=1), write_run(tmp_path / "new", chunks=2)]
    config = json.loads((paths[1] / "config.json").read_text())
    (paths[1] / "config.json").write_text(json.dumps(config | {"later": 7}))
    text = html_page(read_runs(paths))
    differing, rest = text.split("The same in all", 1)
    assert "--lmhead_chunks" in differing and "--later" not in differing
    assert Page(text).row("--later") == ["unknownnot recorded", "7"] and "Recorded of some" in rest


def test_a_run_that_was_gone_on_with_is_shown_with_the_flags_that_it_ended_with(tmp_path):
    path = write_run(tmp_path / "longer", count=6)
    history = json.loads((path / "run.json").read_text())
    latest = json.loads((path / "config.json").read_text()) | {"steps": 6, "resume": True}
    (path / "run.json").write_text(json.dumps(history | {"continued": [{"step": 4, "config": latest}]}))
    (run,) = read_runs([path])
    assert run.config["steps"] == 6 and "resume" not in run.config
    assert "6 of 6" in comparison_table([run])


def test_labels_differ_and_are_escaped(tmp_path):
    paths = [write_run(tmp_path / parent / "_a$\\frac<b>") for parent in ("x", "y")]
    runs = read_runs([*paths, paths[0]])
    assert [run.label for run in runs] == ["x/_a$\\frac<b>", "y/_a$\\frac<b>", "x/_a$\\frac<b> (2)"]
    text = html_page([*runs, *read_runs(paths[:1])])
    assert "<b>" not in text
    assert Page(text).rows[0][1:] == [run.label for run in runs] + ["_a$\\frac<b>"]
    assert text.count("_a$\\frac&lt;b&gt;</text>") == 3 * 4  # in the legend of every figure
    assert text.count("_a$\\frac&lt;b&gt; (2)</text>") == 4


def test_the_markdown_table_has_the_same_numbers(tmp_path):
    table = comparison_table(read_runs([write_run(tmp_path / "a"), write_run(tmp_path / "b", energy=False)]))
    a, b = table.splitlines()[2:]
    assert a.startswith("| a | by device | 4 | completed | 4 of 4 | 2,000 (2,000 to 2,000) | unknown | 4.321 ± 0.050 |")
    assert "| unknown | unknown |" in b


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("summary.json", "{", "summary.json is damaged"),
        ("config.json", "[]", "config.json is damaged"),
        ("steps.jsonl", '{"step": 1}\n', "steps.jsonl, line 1 has no number time_s"),
        ("steps.jsonl", "\udcff", "steps.jsonl is damaged"),
        ("stretches.jsonl", '{"last_step": 3}', "stretches.jsonl, line 1 has no number first_step"),
        ("telemetry.csv", "time_s,power_w\n1,x\n", "telemetry.csv is damaged"),
    ],
)
def test_damaged_records_are_named(tmp_path, name, content, words):
    path = write_run(tmp_path / "run")
    (path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=re.escape(words)):
        read_runs([path])


def test_what_cannot_be_used_is_named(tmp_path):
    with pytest.raises(InputError, match="no run was given"):
        read_runs([])
    with pytest.raises(InputError, match="holds no records"):
        read_runs([tmp_path])
    with pytest.raises(InputError, match="cannot be written"):
        write_report(read_runs([write_run(tmp_path / "run")]), tmp_path)


def test_only_a_report_is_replaced(tmp_path):
    runs, path = read_runs([write_run(tmp_path / "run")]), tmp_path / "report.html"
    path.touch()
    write_report(runs, path)
    write_report(runs, path)
    path.write_text("<title>My notes</title> on Training runs: none")
    with pytest.raises(InputError, match="is no report of training runs: choose another name"):
        write_report(runs, path)
    assert "My notes" in path.read_text()


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    path = write_run(tmp_path / "run")
    lines = (path / "steps.jsonl").read_text().splitlines()
    lines[1] = json.dumps(json.loads(lines[1]) | {"loss": None})
    (path / "steps.jsonl").write_text("\n".join(lines) + "\n")
    (path / "validation.jsonl").write_text(json.dumps({"step": 4, "val_loss": None}) + "\n")
    assert Page(html_page(read_runs([path]))).row("validation loss") == ["unknownit is not a finite number"]


def test_thinning_keeps_extremes_and_gaps():
    x = np.arange(10_000.0)
    y = np.sin(x)
    y[777], y[5000] = 9.0, np.nan
    few_x, few_y = thinned(x, y)
    assert len(few_x) < 2000 and (np.diff(few_x) > 0).all()
    assert few_y[few_x == 777] == 9.0
    assert np.isnan(few_y[few_x == 5000]).all()
    assert len(thinned(x[:100], y[:100])[0]) == 100


def test_bins_are_means_and_percentiles():
    mean, low, high = binned(np.array([0.1, 0.2, 2.5, 9.0]), np.array([1.0, 3.0, np.nan, 5.0]), np.arange(4.0))
    np.testing.assert_allclose(mean, [2.0, np.nan, np.nan])
    np.testing.assert_allclose([low[0], high[0]], [1.2, 2.8])
