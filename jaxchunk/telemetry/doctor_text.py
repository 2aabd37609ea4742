"""The doctor's findings as a text for people."""

import textwrap
from collections.abc import Mapping
from typing import Any

from jaxchunk.telemetry.window import MAX_RELATIVE_BOUND

_SOURCE_LABELS = {
    "nvml_total_energy": "the total-energy counter",
    "nvml_power_instant": "the integral of instantaneous power",
    "nvml_power_average": "the integral of averaged power",
}
_WIDTH = 120


def render(diagnosis: Mapping[str, Any]) -> str:
    """The diagnosis as text for people, at most 120 columns wide; one sentence per GPU at the end."""
    lines: list[str] = []
    if not diagnosis["gpus"]:
        lines += [f"No GPU: {diagnosis['gpus_null_reason']}.", ""]
    for number, gpu in enumerate(diagnosis["gpus"]):
        lines += [*_render_gpu(number, gpu), ""]
    lines.append("Meters of the host" if diagnosis["rails"] else "Meters of the host: none found that can be used.")
    for rail in diagnosis["rails"]:
        row = f"  {rail['name']:<28} {rail['scope']:<12} {rail['kind']:<7} {rail['status'].replace('_', ' ')}"
        lines.append(f"{row}: {rail['reason']}" if rail["value"] is None else f"{row}: {_quantity(rail)}")
    lines += [f"  {sensor['name']}: seen, not used: {sensor['reason']}" for sensor in diagnosis["unused_sensors"]]
    lines.append("")
    lines += [_sentence(number, gpu) for number, gpu in enumerate(diagnosis["gpus"])]
    wrapped = [_wrap(line) for line in lines]
    return "\n".join(wrapped).rstrip("\n") + "\n"


def _render_gpu(number: int, gpu: Mapping[str, Any]) -> list[str]:
    facts = [
        f"{label} {gpu[key] or 'unknown'}"
        for label, key in (("PCI", "pci_bus_id"), ("driver", "driver_version"), ("CUDA", "cuda_driver_version"))
    ]
    simulated = ["  SIMULATED: none of these figures is a measurement of a device."] if gpu.get("simulated") else []
    lines = [f"GPU {number}: {gpu['name']} ({gpu['uuid']})", *simulated, f"  {', '.join(facts)}"]
    lines.append(f"  {'call':<18}{'status':<15}{'value':>24}{'CPU ms':>9}{'wall ms':>9}  changes every")
    for call, described in gpu["calls"].items():
        row = f"  {call:<18}{described['status'].replace('_', ' '):<15}"
        if described["cpu_s"] is None:
            lines.append(f"{row}{described['reason']}")
            continue
        cost = f"{described['cpu_s'] * 1e3:>9.3f}{described['wall_s'] * 1e3:>9.3f}"
        lines.append(f"{row}{_quantity(described):>24}{cost}  {_rhythm(described)}")
    return lines + _render_findings(gpu)


def _render_findings(gpu: Mapping[str, Any]) -> list[str]:
    comparison, throttling, processes = gpu["comparison"], gpu["throttling"], gpu["other_processes"]
    if comparison["difference_percent"] is None:
        lines = [f"  Energy sources were not compared: {comparison['difference_percent_null_reason']}."]
    else:
        percent = round(comparison["difference_percent"], 1) + 0.0  # no -0.0
        lines = [
            f"  Energy sources compared ({comparison['label']}): counter {comparison['counter_j']:.1f} J, integral of "
            f"instantaneous power {comparison['power_integral_j']:.1f} J ({percent:+.1f}%)."
        ]
    if throttling is None:
        lines.append(f"  Throttling unknown: {gpu['throttling_null_reason']}.")
    else:
        reasons = ", ".join(
            f"{reason} {seconds['total_s']:.3f} s ({seconds['during_probe_s'] or 0.0:+.3f} s during the probe)"
            for reason, seconds in throttling.items()
        )
        lines.append(f"  Throttling since the counters began: {reasons or 'none'}.")
    if processes is None:
        lines.append(f"  Other processes unknown: {gpu['other_processes_null_reason']}.")
    else:
        sizes = [
            "memory unknown" if each["bytes"] is None else f"{each['bytes'] / 2**20:.0f} MiB" for each in processes
        ]
        found = ", ".join(f"{each['pid']} ({size})" for each, size in zip(processes, sizes, strict=True))
        lines.append(f"  Other processes on it: {found or 'none'}.")
    return lines


def _sentence(number: int, gpu: Mapping[str, Any]) -> str:
    if gpu["energy_source"] is None:
        return f"GPU {number}: there will be no energy, because of {gpu['energy_source_reason']}."
    sentence = f"GPU {number}: Energy will come from {_SOURCE_LABELS.get(gpu['energy_source'], gpu['energy_source'])} "
    sentence += f"because {gpu['energy_source_reason']}"
    if gpu["min_step_s"] is not None:
        sentence += (
            f"; steps longer than about {gpu['min_step_s']:.1f} s will have a bound under {MAX_RELATIVE_BOUND:.0%} "
            "where their power swings by no more than its mean"
        )
    return sentence + "."


def _rhythm(described: Mapping[str, Any]) -> str:
    period_s = described["update_period_s"]
    if period_s is None:
        text = str(described["update_period_s_null_reason"])
    else:
        text = f"{'at most ' if described['update_period_is_at_most'] else ''}{period_s * 1e3:.1f} ms"
    if described.get("resolution_j") is not None:
        text += f", resolution <= {described['resolution_j']:g} J"
    if described["failures"]:
        text += f"; {described['failures']} readings failed ({described['last_failure']})"
    return text


def _quantity(described: Mapping[str, Any]) -> str:
    value = described["value"]
    if isinstance(value, dict):
        return f"{len(value)} counters"
    return "unknown" if value is None else f"{round(value, 3):.12g} {described['unit']}"


def _wrap(line: str) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 4)
    return "\n".join(textwrap.wrap(line, _WIDTH, subsequent_indent=indent, break_on_hyphens=False)) if line else ""
