"""The profile of a run's training step as a page and a figure in its directory."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxchunk import plotting
from jaxchunk.bench import step_profile
from jaxchunk.bench.roofline import COMPONENTS, Cost, Rates, step_costs
from jaxchunk.bench.step_profile import StepProfile
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.training.flops import BANDWIDTH, PEAK_FLOPS_16_BIT
from jaxchunk.training.trace import parse_steps


def write(run: Path, peak_tflops: float | None, bandwidth_tbs: float | None) -> str:
    """Writes `step_profile.md`, and with a trace `step_profile.png`, into a run's directory; returns the text.

    Args:
      run: directory of a run of train.py.
      peak_tflops: what GEMMs reach there, or None for the data sheet's peak.
      bandwidth_tbs: what memory reaches there, TB/s, or None likewise.

    Raises:
      InputError: the directory holds no run, or its trace cannot be used.
    """
    try:
        config, about = (json.loads((run / name).read_text()) for name in ("config.json", "env.json"))
        chosen = about["chosen"]
    except (OSError, ValueError, KeyError):
        raise InputError(f"{run} holds no run of train.py: config.json and env.json are missing or damaged") from None
    costs, rates = _costs(config, chosen), _rates(about, config, peak_tflops, bandwidth_tbs)
    profile = None
    if config.get("profile_steps") is not None:  # runs of earlier versions do not have it
        first, last = parse_steps(config["profile_steps"])
        profile = step_profile.read(run / "profile", last - first + 1)
    lines = [_title(config, about), "", step_profile.table(profile, costs, rates)]
    if rates is None:
        lines.append(
            f"No roofline: the rates of {about['device_kind']} are not known; give --peak_tflops and --bandwidth_tbs"
        )
    if profile is None:
        lines.append("No trace: train with --profile_steps, such as 10:15")
    else:
        lines.append(f"figure: {_draw(profile, costs, rates, _title(config, about), run / 'step_profile.png')}")
    text = "\n".join(lines)
    (run / "step_profile.md").write_text(text + "\n")
    return text


def _costs(config: dict[str, Any], chosen: dict[str, Any]) -> list[Cost]:
    model = hf.parse_config(chosen["model"], "env.json") if "model" in chosen else qwen2.SIZES[config["model"]]
    return step_costs(
        model,
        tokens=config["batch_size"] * config["seq_len"],
        seq_len=config["seq_len"],
        micro_batches=config["batch_size"] // chosen["micro_batch_size"],
        lmhead_chunks=chosen["lmhead_chunks"],
        itemsize=2 if config["compute_dtype"] == "bfloat16" else 4,
    )


def _rates(
    about: dict[str, Any], config: dict[str, Any], peak_tflops: float | None, bandwidth_tbs: float | None
) -> Rates | None:
    kind, is_16_bit = about["device_kind"], config["compute_dtype"] == "bfloat16"
    flops = 1e12 * peak_tflops if peak_tflops else PEAK_FLOPS_16_BIT.get(kind) if is_16_bit else None
    bandwidth = 1e12 * bandwidth_tbs if bandwidth_tbs else BANDWIDTH.get(kind)
    return None if flops is None or bandwidth is None else Rates(flops, bandwidth)


def _title(config: dict[str, Any], about: dict[str, Any]) -> str:
    return (
        f"{config['model']}, {config['batch_size']} x {config['seq_len']} tokens a step, {config['lmhead_chunks']} "
        f"chunk(s), {about['device_kind']}"
    )


def _draw(profile: StepProfile, costs: Sequence[Cost], rates: Rates | None, title: str, path: Path) -> Path:
    parts = (*COMPONENTS, step_profile.UNATTRIBUTED)
    measured_s = {
        part: {kind: profile.by_part.get((part, kind), 0.0) for kind in step_profile.CLASSES} for part in parts
    }
    measured_s["idle"] = {"idle": profile.idle_s}
    bounds_s = {} if rates is None else {cost.component: rates.seconds(cost) for cost in costs}
    return plotting.plot_step_profile(measured_s, bounds_s, title, path)
