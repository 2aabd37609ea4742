"""What is compared between training runs: each quantity as text, with the reason where it is not known."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxchunk.measuring.tables import markdown_of_cells
from jaxchunk.report.run_records import RunRecords
from jaxchunk.telemetry import THROTTLE_REASONS

UNKNOWN = "unknown"


class Cell(NamedTuple):
    """A quantity of a run. `note`: why it is unknown, or what to know of it."""

    text: str
    note: str | None = None


def comparison_table(runs: Sequence[RunRecords]) -> str:
    """A Markdown table with a row for each run and a column for each of `QUANTITIES`; notes are left out."""
    header = ("run", "LM head", "chunks", *QUANTITIES)
    lines = []
    for run in runs:
        head = run.config.get("lmhead_impl", UNKNOWN) or "by device", str(run.config.get("lmhead_chunks", UNKNOWN))
        cells = (quantity(run).text for quantity in QUANTITIES.values())
        lines.append([run.label.replace("|", r"\|"), *head, *cells])
    return markdown_of_cells(header, lines)


def _status(run: RunRecords) -> Cell:
    if not run.finished:
        return Cell("no finished run", "there is no summary: it was killed, or goes on still")
    if (status := run.summary.get("status")) is None:
        return Cell(UNKNOWN, "the version that wrote the summary did not say")
    return Cell(status, run.summary.get("status_reason"))


def _steps(run: RunRecords) -> Cell:
    planned = run.config.get("steps")
    return Cell(f"{len(run.steps):,}" + ("" if planned is None else f" of {planned}"))


def _speed(run: RunRecords) -> Cell:
    seconds = run.summary.get("step_time_s_p10_p90")
    if seconds is None or run.tokens_per_step is None:
        return _no_step(run)
    fast, slow = (run.tokens_per_step / s for s in seconds)
    return Cell(f"{run.summary['tokens_per_s_median']:,.0f} ({slow:,.0f} to {fast:,.0f})")


def _mfu(run: RunRecords) -> Cell:
    mfu = run.summary.get("mfu_median")
    if mfu is None:
        return Cell(UNKNOWN, "the device's peak FLOP/s are not known") if run.steps else _no_step(run)
    return Cell(f"{mfu:.1%}")


def _energy(run: RunRecords) -> Cell:
    summary = run.summary
    if (energy := summary.get("energy_per_token_j")) is None:
        return Cell(UNKNOWN, summary["energy_null_reason"]) if summary.get("energy_null_reason") else _no_step(run)
    bound = summary["energy_bound_j"] / summary["energy_j"] * energy
    of = f"of the first {summary['energy_of_steps']:,} steps" if "energy_of_steps" in summary else None
    return Cell(f"{energy * 1e3:.3f} ± {bound * 1e3:.3f}", of)


def _power(run: RunRecords) -> Cell:
    return _mean_and_std(run, "power_w", "power_instant_w")


def _clock(run: RunRecords) -> Cell:
    return _mean_and_std(run, "sm_clock_mhz", "sm_clock_mhz")


def _mean_and_std(run: RunRecords, name: str, call: str) -> Cell:
    mean, std = run.summary.get(f"{name}_mean"), run.summary.get(f"{name}_std")
    if mean is None:
        return _not_measured(run, call)
    return Cell(f"{mean:.0f}", "mean of the steps' means") if std is None else Cell(f"{mean:.0f}, {std:.0f}")


def _temperature(run: RunRecords) -> Cell:
    temperature = run.summary.get("temperature_c_max")
    return _not_measured(run, "temperature_c") if temperature is None else Cell(f"{temperature:.0f}")


def _throttle(run: RunRecords) -> Cell:
    seconds = run.summary.get("throttle_s")
    if seconds is None:
        return _not_measured(run, "throttle_s")
    gpus = max((record.num_devices for record in run.steps), default=1)
    training_s = run.summary["training_time_s"]
    total = f"{training_s:.1f}" if gpus == 1 else f"{gpus} x {training_s:.1f}"
    parts = [f"{reason} {s:.1f} ({s / (gpus * training_s):.0%} of {total})" for reason, s in seconds.items() if s]
    missing = [reason for reason in THROTTLE_REASONS if reason not in seconds]
    note = f"not reported by the device: {', '.join(missing)}" if missing else None
    return Cell(", ".join(parts) or "0 for every reason", note)


def _memory(run: RunRecords) -> Cell:
    peak = run.summary.get("peak_memory_bytes")
    if peak is None:
        return Cell(UNKNOWN, "the device does not report it" if run.finished else "it is written down at the end")
    return Cell(f"{peak / 1e9:.1f}")


def _training_loss(run: RunRecords) -> Cell:
    if not run.steps:
        return _no_step(run)
    return _loss(run.summary.get("final_train_loss"))


def _validation_loss(run: RunRecords) -> Cell:
    if not run.validation:
        return Cell(UNKNOWN, "there was no validation")
    last = run.validation[-1]
    early = last["step"] != run.steps[-1].step if run.steps else False
    return _loss(last["val_loss"], f"after step {last['step']:,}" if early else None)


def _loss(loss: float | None, note: str | None = None) -> Cell:
    known = loss is not None and math.isfinite(loss)
    return Cell(f"{loss:.4f}", note) if known else Cell(UNKNOWN, "it is not a finite number")


def _no_step(run: RunRecords) -> Cell:
    return Cell(UNKNOWN, "no step was completed" if not run.steps else "the summary does not say")


def _not_measured(run: RunRecords, call: str) -> Cell:
    """Why telemetry has no value: what the device answered to the call, or why there was nothing to ask."""
    gpu: dict[str, Any] = run.environment.get("gpu") or {}
    answer = (gpu.get("probes") or {}).get(call)
    if answer not in (None, "supported"):
        return Cell(UNKNOWN, answer)
    if not run.steps:
        return _no_step(run)
    return Cell(UNKNOWN, run.summary.get("energy_null_reason") or run.steps[-1].energy_null_reason or "no samples")


# By header, in the order of the table. "std" is the standard deviation of the samples after the first steps: the ripple
# within and between steps.
QUANTITIES: dict[str, Callable[[RunRecords], Cell]] = {
    "status": _status,
    "steps": _steps,
    "tokens/s: median (p10 to p90)": _speed,
    "MFU: median": _mfu,
    "mJ/token (total)": _energy,
    "power, W: mean, std": _power,
    "SM clock, MHz: mean, std": _clock,
    "temperature, °C: highest": _temperature,
    "throttled, s, by reason": _throttle,
    "peak memory, GB": _memory,
    "training loss: last 10 steps": _training_loss,
    "validation loss": _validation_loss,
}
