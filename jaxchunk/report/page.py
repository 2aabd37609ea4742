"""A page that compares training runs: one HTML file with all that it needs, which opens offline and without scripts."""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from jaxchunk.errors import InputError
from jaxchunk.plotting.style import run_style
from jaxchunk.report import figures
from jaxchunk.report.comparison import QUANTITIES, UNKNOWN, Cell
from jaxchunk.report.run_records import RunRecords

_ELSEWHERE = ("out_dir", "overwrite", "resume", "cache_dir", "log")  # flags that say where to, not what is computed
_NOT_THERE = Cell(UNKNOWN, "not recorded")

_TITLE = "Training runs: "
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1400px; margin: 2em auto;
  padding: 0 1.5em; }
h1 { font-size: 1.5em; margin: 0 0 .2em; }
h2 { font-size: 1.15em; margin: 2em 0 .4em; }
p, figcaption, .note { color: #555; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35em .9em; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd; min-width: 8em;
  max-width: 22em; overflow-wrap: anywhere; }
thead th { border-bottom: 2px solid #888; }
tbody th { font-weight: normal; color: #444; position: sticky; left: 0; background: #fff; min-width: 13em; }
.note, .block { display: block; }
.note { font-size: .82em; }
.unknown { color: #777; font-style: italic; }
.swatch { vertical-align: middle; margin-right: .5em; }
summary { cursor: pointer; margin-top: .8em; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1.5em; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
figcaption { font-size: .87em; }
"""


def write_report(runs: Sequence[RunRecords], path: Path) -> Path:
    """Writes the page.

    Args:
      runs: the runs, in the order of the columns.
      path: the HTML file; a report that is there is replaced.

    Returns:
      `path`.

    Raises:
      InputError: it cannot be written, or something else is there.
    """
    page = html_page(runs)
    try:
        if path.is_file() and path.stat().st_size and f"<title>{_TITLE}".encode() not in path.read_bytes():
            raise InputError(f"--out {path} is there, and is no report of training runs: choose another name")
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path} cannot be written: {error.strerror or error}") from None
    return path


def html_page(runs: Sequence[RunRecords]) -> str:
    """The page as text."""
    title = ", ".join(run.label for run in runs)
    measured = {name: [quantity(run) for run in runs] for name, quantity in QUANTITIES.items()}
    unlike, alike, partial = _split(_configuration(runs))
    parts = [
        f"<h1>{len(runs)} training run{'' if len(runs) == 1 else 's'}</h1>",
        "<p>Energy is the GPU's own, as NVML reports it, not the wall's; after ± stands the bound of its error. "
        "What is unknown says why.</p>",
        "<h2>Where they ran</h2>",
        _table(runs, {name: [about(run) for run in runs] for name, about in _SURROUNDINGS.items()}, merge=True),
        "<h2>What differs in their configuration</h2>",
        _table(runs, unlike) if unlike else "<p>Nothing.</p>" if len(runs) > 1 else "<p>There is one run only.</p>",
        _folded("The same in all" if len(runs) > 1 else "All of it", runs, alike),
        _folded("Recorded of some of them only, and the same in those", runs, partial),
        "<h2>What they came to</h2>",
        _table(runs, measured),
        "<h2>Figures</h2>",
        f'<div class="figures">{"".join(_figure(figure, runs) for figure in _FIGURES)}</div>',
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_TITLE}{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


class _Figure(NamedTuple):
    """`draw` gives SVG, or None where there is nothing to draw; `lacks` says why a run is not in it, if so."""

    title: str
    draw: Callable[[Sequence[RunRecords]], str | None]
    caption: str
    lacks: Callable[[RunRecords], str | None]


def _figure(figure: _Figure, runs: Sequence[RunRecords]) -> str:
    svg = figure.draw(runs)
    missing = {run.label: reason for run in runs if (reason := figure.lacks(run)) is not None}
    notes = "".join(
        f'<span class="block">Not shown: {escape(label)} ({escape(reason)}).</span>'
        for label, reason in missing.items()
    )
    caption = "Unknown." if svg is None else escape(figure.caption)
    return f"<figure><h3>{escape(figure.title)}</h3>{svg or ''}<figcaption>{caption}{notes}</figcaption></figure>"


def _lacks_steps(run: RunRecords) -> str | None:
    return None if run.steps else "no step was completed"


def _lacks_energy(run: RunRecords) -> str | None:
    if not run.steps:
        return _lacks_steps(run)
    if any(step.energy_j is not None for step in run.steps) or any(s.energy_j is not None for s in run.stretches):
        return None
    return f"of its last step: {run.steps[-1].energy_null_reason or 'not recorded'}"


def _lacks_telemetry(run: RunRecords) -> str | None:
    if not run.steps:
        return _lacks_steps(run)
    return None if run.telemetry else run.steps[-1].energy_null_reason or "there is no telemetry.csv"


_FIGURES = (
    _Figure(
        "Loss",
        figures.loss_figure,
        "Lines: training. Dots: validation. Below, where there are several runs: the difference from the first.",
        _lacks_steps,
    ),
    _Figure(
        "Speed",
        figures.speed_figure,
        "The scale is that of the steps after the first few, which may lie outside of it.",
        _lacks_steps,
    ),
    _Figure(
        "Energy",
        figures.energy_figure,
        "Dots: steps of known energy, with the bound of its error. Lines: between validations and checkpoints.",
        _lacks_energy,
    ),
    _Figure(
        "Power, temperature and clock",
        figures.telemetry_figure,
        "Lines: means. Bands: 10th to 90th percentile of the samples.",
        _lacks_telemetry,
    ),
)


def _folded(title: str, runs: Sequence[RunRecords], rows: Mapping[str, Sequence[Cell]]) -> str:
    """A table that opens at a click; nothing where it would be empty."""
    if not rows:
        return ""
    return f"<details><summary>{title}: {len(rows)} settings</summary>{_table(runs, rows, merge=True)}</details>"


def _table(runs: Sequence[RunRecords], rows: Mapping[str, Sequence[Cell]], *, merge: bool = False) -> str:
    """Columns are runs; with `merge`, what is the same in all of them is there once."""
    names = "".join(f'<th scope="col">{_swatch(i)}{escape(run.label)}</th>' for i, run in enumerate(runs))
    header = f"<thead><tr><td></td>{names}</tr></thead>"
    lines = []
    for name, cells in rows.items():
        once = merge and len(set(cells)) == 1
        content = [_cell(cells[0], columns=len(cells))] if once else map(_cell, cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(content)}</tr>')
    return f'<div class="scroll"><table>{header}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(cell: Cell, columns: int = 1) -> str:
    note = f'<span class="note">{escape(cell.note)}</span>' if cell.note else ""
    unknown = ' class="unknown"' if cell.text == UNKNOWN else ""
    span = f' colspan="{columns}"' if columns > 1 else ""
    return f"<td{unknown}{span}>{escape(cell.text)}{note}</td>"


def _swatch(index: int) -> str:
    style = run_style(index)
    dashes = {"-": "none", "--": "6 3", ":": "2 2", "-.": "6 2 2 2"}[style["linestyle"]]
    return (
        f'<svg class="swatch" width="22" height="8" aria-hidden="true"><line x1="0" y1="4" x2="22" y2="4" '
        f'stroke="{style["color"]}" stroke-width="3" stroke-dasharray="{dashes}"/></svg>'
    )


def _configuration(runs: Sequence[RunRecords]) -> dict[str, list[Cell]]:
    """Every flag of any run, and what was chosen where a flag was left open."""
    settings = [_settings(run) for run in runs]
    names = dict.fromkeys(name for of_run in settings for name in of_run)
    return {name: [of_run.get(name, _NOT_THERE) for of_run in settings] for name in names}


def _settings(run: RunRecords) -> dict[str, Cell]:
    flags = {f"--{name}": _value(value) for name, value in run.config.items() if name not in _ELSEWHERE}
    chosen = run.environment.get("chosen") or {}
    data = run.environment.get("data") or {}
    return (
        flags
        | {f"chosen: {name}": _value(value) for name, value in chosen.items()}
        | {f"data: {name}": _value(data[name]) for name in ("description", "tokens", "tokens_sha256") if name in data}
    )


def _value(value: Any) -> Cell:
    if value is None:
        return Cell("not given")
    return Cell(value if isinstance(value, str) else json.dumps(value))


def _split(rows: Mapping[str, list[Cell]]) -> tuple[dict[str, list[Cell]], ...]:
    """Those in which the runs differ, those in which they are alike, those that some of them lack and others share."""
    unlike: dict[str, list[Cell]] = {}
    alike: dict[str, list[Cell]] = {}
    partial: dict[str, list[Cell]] = {}
    for name, cells in rows.items():
        kind = unlike if len({*cells} - {_NOT_THERE}) > 1 else partial if _NOT_THERE in cells else alike
        kind[name] = cells
    return unlike, alike, partial


def _device(run: RunRecords) -> Cell:
    if (kind := run.environment.get("device_kind")) is None:
        return _NOT_THERE
    device = (run.environment.get("gpu") or {}).get("device") or {}
    about = [
        f"driver {driver}" if (driver := device.get("driver_version")) else None,
        f"power limit {limit:.0f} W" if (limit := device.get("power_limit_w")) else None,
        None if device else run.environment.get("cpu"),
    ]
    return Cell(kind, ", ".join(filter(None, about)) or None)


def _versions(run: RunRecords) -> Cell:
    if (version := run.environment.get("jaxchunk")) is None:
        return _NOT_THERE
    packages = {"Python": run.environment.get("python"), **(run.environment.get("packages") or {})}
    return Cell(f"jaxchunk {version}", ", ".join(f"{name} {number}" for name, number in packages.items() if number))


def _commit(run: RunRecords) -> Cell:
    commit, digest = run.environment.get("git_commit"), run.environment.get("source_sha256")
    about = (
        None if commit else "it ran from no checkout",
        f"sha256 of the source {digest[:12]}" if digest else None,
    )
    return Cell(commit or UNKNOWN, ", ".join(filter(None, about)) or None)


def _began(run: RunRecords) -> Cell:
    if (began_s := run.history.get("began_unix_s")) is None:
        return _NOT_THERE
    text = datetime.datetime.fromtimestamp(began_s, datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    after = [f"step {again.get('step', UNKNOWN)}" for again in run.history.get("continued", ())]
    return Cell(text, f"gone on with after {', '.join(after)}" if after else None)


_SURROUNDINGS = {"device": _device, "versions": _versions, "commit": _commit, "began": _began}
