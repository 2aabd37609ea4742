"""`scripts/simulate_controller.py`: runs the closed loop, and writes records, summary and figure."""

import dataclasses
import json
from typing import Any, Literal

import numpy as np

import jaxchunk
from jaxchunk import environment
from jaxchunk.errors import InputError
from jaxchunk.plotting.controller import plot_controller
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.simulation import adaptive, devices
from jaxchunk.simulation.adaptive import Run
from jaxchunk.simulation.devices import SimulatedGpu
from jaxchunk.tuning.policy import Rules

_BIN_S = 30.0
_NOTICE: dict[str, Any] = {"what": "SIMULATION: nothing here was measured"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateControllerConfig:
    """Adaptive chunks on a simulated GPU."""

    device: str = "gb10"
    """gb10, l40s, h200, or a device file; it needs a table `training`."""
    candidates: tuple[int, ...] = (1, 4, 16)
    """Chunk counts that the policy chooses from."""
    objective: Literal["time", "energy", "edp"] = "time"
    """What it minimises."""
    constants: float = adaptive.SCENARIO_CONSTANTS
    """Length of the simulation, in thermal time constants of the device."""
    seed: int = 0
    """Of the plant."""
    scenario: str = "standard"
    """Which disturbances: one of standard, early, close, mild, edge, strong, fan-first, swing."""
    spread: int = 0
    """So many seeds from `seed` on, of all scenarios, with the policy alone: only spread.jsonl is written."""
    out_dir: str | None = None
    """Where records, summary and figure go. Default: a new directory under runs/."""
    overwrite: bool = False
    """Replace a run that out_dir holds."""


def run(config: SimulateControllerConfig) -> dict[str, Any]:
    """Simulates, and writes everything into the run's directory.

    Returns:
      The summary.

    Raises:
      InputError: the device or a flag cannot be used.
    """
    gpu = devices.load(config.device)
    _check(config)
    gpu.phases("training", "random", max(config.candidates))  # says so at once where there is none
    constant_s = gpu.profile.thermal.time_constant_s
    rules = Rules(tuple(sorted(set(config.candidates))), thermal_constant_s=constant_s)
    with RunDirectory(config.out_dir or new_run_path("simulate-controller"), overwrite=config.overwrite) as directory:
        directory.write_json("config.json", dataclasses.asdict(config))
        directory.write_json("env.json", {"jaxchunk": jaxchunk.__version__, "git_commit": environment.git_commit()})
        simulate = _spread if config.spread else _compare
        return simulate(config, gpu, rules, config.constants * constant_s, directory)


def _check(config: SimulateControllerConfig) -> None:
    if not config.candidates or min(config.candidates) < 1:
        raise InputError(f"--candidates is {' '.join(map(str, config.candidates))}; give counts from 1 on")
    if not 1 <= config.constants < float("inf"):
        raise InputError(f"--constants is {config.constants}; it must be at least 1, and finite")
    if config.scenario not in adaptive.SCENARIOS:
        raise InputError(f"--scenario is {config.scenario}; choose from {', '.join(adaptive.SCENARIOS)}")


def _compare(
    config: SimulateControllerConfig, gpu: SimulatedGpu, rules: Rules, end_s: float, directory: RunDirectory
) -> dict[str, Any]:
    """The policy beside every fixed count, through one scenario."""
    scenario = [d for d in adaptive.SCENARIOS[config.scenario] if d.constants < config.constants]
    options: dict[str, Any] = {"scenario": scenario, "end_s": end_s, "seed": config.seed}
    fixed = {}
    for n in rules.candidates:
        print(f"simulating {gpu.profile.name} for {end_s / 60:.0f} minutes at {n} chunk(s) ...", flush=True)
        fixed[n] = adaptive.run_fixed(gpu, n, **options)
    print("simulating the policy ...", flush=True)
    ours = adaptive.run_adaptive(gpu, rules, config.objective, **options)
    compared = adaptive.compare(ours, fixed, scenario=scenario, constant_s=rules.thermal_constant_s, end_s=end_s)
    summary = _NOTICE | compared
    for decision in ours.decisions:
        directory.append("chunks.jsonl", decision)
    bins = _bins(ours, {str(n): run for n, run in fixed.items()} | {"adaptive": ours}, end_s)
    directory.write_json("bins.json", bins)
    directory.write_json("summary.json", summary)
    figure = plot_controller(directory.path, bins, ours.decisions, summary, gpu.profile.name)
    print(json.dumps(summary, indent=2))
    print(f"figure: {figure}")
    return summary


def _spread(
    config: SimulateControllerConfig, gpu: SimulatedGpu, rules: Rules, end_s: float, directory: RunDirectory
) -> dict[str, Any]:
    """How often the policy switches, by scenario, in order of the seeds."""
    switches: dict[str, list[int]] = {name: [] for name in adaptive.SCENARIOS}
    for name, scenario in adaptive.SCENARIOS.items():
        for seed in range(config.seed, config.seed + config.spread):
            ours = adaptive.run_adaptive(gpu, rules, config.objective, scenario=scenario, end_s=end_s, seed=seed)
            events = [decision["event"] for decision in ours.decisions]
            switches[name].append(ours.decisions[-1]["switches"] if ours.decisions else 0)
            found = {"switches": switches[name][-1], "adopted": events.count("adopt"), "steps": len(ours.steps)}
            directory.append("spread.jsonl", {"scenario": name, "seed": seed} | found)
        print(f"{gpu.profile.name}, {name}: {switches[name]} switches", flush=True)
    return _NOTICE | {"switches": switches}


def _bins(ours: Run, runs: dict[str, Run], end_s: float) -> dict[str, Any]:
    """Means over half a minute each, for the figure."""
    edges_s = np.arange(0.0, end_s + 1e-9, _BIN_S)
    middles_s = (edges_s[1:] + edges_s[:-1]) / 2
    ends_s = np.array([step.end_s for step in ours.steps])
    at = np.minimum(np.searchsorted(ends_s, middles_s), len(ends_s) - 1)
    return {
        "time_s": middles_s.tolist(),
        "throughput": {name: np.round(run.rates(edges_s), 6).tolist() for name, run in runs.items()},
        "num_chunks": [ours.steps[i].num_chunks for i in at],
        "temperature_c": [round(ours.steps[i].temperature_c, 2) for i in at],
        "clock_mhz": [round(ours.steps[i].clock_mhz, 1) for i in at],
    }
