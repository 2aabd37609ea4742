"""`scripts/simulate.py`: runs a simulated device at chunk counts and writes records, summary, table and figure."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxchunk import environment, plotting
from jaxchunk.errors import InputError
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import OutputConfig
from jaxchunk.measuring.tables import Column, markdown
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.simulation import devices, points, sweeps
from jaxchunk.simulation.devices import SimulatedGpu
from jaxchunk.simulation.experiment import Row, gain, record, run_cases
from jaxchunk.simulation.points import Case
from jaxchunk.simulation.traces import Recorded, traces

NOTICE = "SIMULATION. No figure in this directory was measured on a device, except those under 'measured'."


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationConfig(OutputConfig):
    """A simulated device at chunk counts."""

    device: str
    """gb10, l40s, h200, or a TOML or JSON file with a device of your own (docs/simulation.md)."""
    chunks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Chunk counts of the microbenchmark; 1 is always among them."""
    training_chunks: tuple[int, ...] = (1, 4, 16)
    """Chunk counts of training, where the device has a training workload; 1 is always among them."""
    compare_chunks: int = 4
    """Chunk count whose gain over one chunk the sweeps show."""
    measured_s: float = 120.0
    """Simulated seconds that count, of each case; twice the thermal time constant passes before."""
    repeats: int = 3
    """Seeds of every case; medians are reported."""
    seed: int = 0
    """The first of the seeds."""


def check(config: SimulationConfig) -> None:
    """Refuses what cannot be simulated.

    Raises:
      InputError: naming the flag, its value and what is needed.
    """
    harness.check_output(config)
    harness.check_seed(config.seed)
    if config.go_on:
        raise InputError("--continue is not for simulations: they take less than a few minutes; use --overwrite")
    for flag, counts in (
        ("chunks", config.chunks),
        ("training_chunks", config.training_chunks),
        ("compare_chunks", (config.compare_chunks,)),
    ):
        if not counts or min(counts) < 1:
            raise InputError(f"--{flag} is {' '.join(map(str, counts)) or 'empty'}; it must be 1 or more")
    if config.repeats < 1:
        raise InputError(f"--repeats is {config.repeats}; it must be at least 1")
    if not 0 < config.measured_s <= 3600:
        raise InputError(f"--measured_s is {config.measured_s}; it must be above 0 and at most 3600")


def run(config: SimulationConfig) -> RunDirectory:
    """Simulates, and writes everything into the run's directory.

    Raises:
      InputError: a flag, the device or the directory cannot be used.
    """
    check(config)
    gpu = devices.load(config.device)
    with RunDirectory(config.out_dir or new_run_path("simulation"), overwrite=config.overwrite) as directory:
        directory.begin(
            dataclasses.asdict(config), environment.describe_environment({"simulation": True}), benchmark="simulation"
        )
        summary, recorded = simulate(config, gpu, directory)
        directory.write_json("summary.json", summary)
        table = table_of(summary)
        (directory.path / "table.md").write_text(table)
        print(table)
        plotting.plot_simulation(directory.path, summary, recorded)
        print(f"records: {directory.path}")
    return directory


def simulate(
    config: SimulationConfig, gpu: SimulatedGpu, directory: RunDirectory
) -> tuple[dict[str, Any], list[Recorded]]:
    """Runs all cases and sweeps; appends each single row to `records.jsonl`.

    Returns:
      The summary, and stretches of time for the figure.
    """
    seeds = tuple(range(config.seed, config.seed + config.repeats))
    measured = points.load(config.device)
    wanted = list(dict.fromkeys(_cases(config, gpu) + points.cases(measured)))
    append = lambda row: directory.append("records.jsonl", record(row))  # noqa: E731
    rows = run_cases(gpu, wanted, seeds=seeds, measured_s=config.measured_s, on_row=append)
    sweep_s = config.measured_s / 2
    swept = [
        of(gpu, config.compare_chunks, seeds[:2], sweep_s)
        for of in (sweeps.period, sweeps.power_ratio, sweeps.distance)
    ]
    summary = {
        "simulation": NOTICE,
        "device": gpu.profile.name,
        "parameters": devices.tables(config.device),
        "fit": _fit(config.device),
        "compare_chunks": config.compare_chunks,
        "rows": [_summary_row(rows, case) for case in rows],
        "measured": points.residuals(measured, rows),
        "brake_that_reads_power": _reading_power(gpu, seeds, config),
        "sweeps": [dataclasses.asdict(sweep) for sweep in swept],
    }
    return summary, traces(gpu, (1, max(config.chunks)), seed=config.seed)


def table_of(summary: dict[str, Any]) -> str:
    """The summary as Markdown."""
    parts = [
        f"**Simulation of {summary['device']}: nothing here was measured, except the column that says so.**",
        markdown(summary["rows"], _CASE_COLUMNS),
    ]
    if summary["measured"]:
        parts.append(markdown(summary["measured"], _POINT_COLUMNS))
    if fit := summary["fit"]:
        parts.append(f"Free parameters: {len(fit['values'])}, fitted points: {fit['num_points']}.")
    return "\n\n".join(parts) + "\n"


def _cases(config: SimulationConfig, gpu: SimulatedGpu) -> list[Case]:
    counts = sorted({1, *config.chunks})
    cases: list[Case] = [("microbenchmark", "random", number) for number in counts]
    cases += [("microbenchmark", "zero", number) for number in counts]
    if gpu.training is not None:
        cases += [("training", "random", number) for number in sorted({1, *config.training_chunks})]
    return cases


def _summary_row(rows: dict[Case, Row], case: Case) -> dict[str, Any]:
    workload, inputs, _ = case
    return record(rows[case]) | {"speed_over_1": gain(rows, case, (workload, inputs, 1))}


def _fit(device: str) -> dict[str, Any] | None:
    return devices.fit_of(device) if device.lower() in devices.BUILT_IN else None


def _reading_power(gpu: SimulatedGpu, seeds: Sequence[int], config: SimulationConfig) -> list[dict[str, Any]]:
    """Zeros where the brake reads power and does not count events; nothing where it reads power anyway."""
    if gpu.profile.controller.peak_limit_w is None or not gpu.profile.controller.peak_counts_events:
        return []
    controller = dataclasses.replace(gpu.profile.controller, peak_counts_events=False)
    other = dataclasses.replace(gpu, profile=dataclasses.replace(gpu.profile, controller=controller))
    cases: list[Case] = [("microbenchmark", "zero", number) for number in sorted({1, *config.chunks})]
    rows = run_cases(other, cases, seeds=seeds, measured_s=config.measured_s)
    return [_summary_row(rows, case) for case in rows]


_CASE_COLUMNS: tuple[Column, ...] = (
    ("workload", lambda row: row["workload"]),
    ("inputs", lambda row: row["inputs"]),
    ("chunks", lambda row: str(row["chunks"])),
    ("ms", lambda row: f"{row['time_s'] * 1e3:.4g}"),
    ("speed / 1 chunk", lambda row: f"{row['speed_over_1']:.3f}"),
    ("J", lambda row: f"{row['energy_j']:.4g}"),
    ("W", lambda row: f"{row['power_w']:.0f}"),
    ("power ripple, W", lambda row: f"{row['power_std_w']:.1f}"),
    ("SM clock, MHz", lambda row: f"{row['clock_mhz']:.0f}"),
    ("clock ripple, MHz", lambda row: f"{row['clock_std_mhz']:.0f}"),
    ("°C", lambda row: f"{row['temperature_c']:.0f}"),
    ("braked", lambda row: f"{row['hw_power_brake']:.0%}"),
    ("power cap", lambda row: f"{row['sw_power_cap']:.0%}"),
    ("thermal", lambda row: f"{row['sw_thermal']:.0%}"),
)
_POINT_COLUMNS: tuple[Column, ...] = (
    ("point", lambda point: point["label"]),
    ("measured", lambda point: f"{point['value']:.4g}"),
    ("simulated", lambda point: f"{point['simulated']:.4g}"),
    ("residual, tolerances", lambda point: f"{point['residual_in_tolerances']:+.1f}"),
    ("role", lambda point: point["role"]),
    ("source", lambda point: point["source"]),
)
