"""The figure of adaptive chunks on a simulated GPU: what was decided when, and what it was worth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxchunk.plotting.style import BLACK, BLUE, GREY, SMALL, VERMILION, new_panels, run_style, write_titles
from jaxchunk.words import chunks_in_words


def plot_controller(
    path: Path, bins: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]], summary: Mapping[str, Any], device: str
) -> Path:
    """Draws `controller.png` into a run's directory.

    Args:
      path: the directory.
      bins: `time_s` [n], `throughput` by run [n] (the policy's is "adaptive"), and of the policy `num_chunks`,
        `temperature_c` and `clock_mhz` [n].
      decisions: of the policy.
      summary: of the comparison.
      device: its name.

    Returns:
      The figure's path.
    """
    figure, axes = new_panels(4, height=1.5)
    minutes = np.array(bins["time_s"]) / 60
    for index, (name, rates) in enumerate(bins["throughput"].items()):
        label = name if name == "adaptive" else chunks_in_words(int(name))
        style = {"color": BLACK, "linewidth": 1.8} if name == "adaptive" else run_style(index) | {"linewidth": 1.0}
        axes[0].plot(minutes, rates, label=label, **style)
    axes[0].set_ylabel("steps/s")
    axes[0].legend(frameon=False, fontsize=SMALL, ncols=5, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    axes[1].step(minutes, bins["num_chunks"], where="mid", color=BLACK)
    axes[1].set_yscale("log", base=2)
    axes[1].set_yticks(sorted(set(bins["num_chunks"])), [str(n) for n in sorted(set(bins["num_chunks"]))])
    axes[1].set_ylabel("chunks")
    axes[2].plot(minutes, bins["temperature_c"], color=VERMILION)
    axes[2].set_ylabel("°C")
    axes[3].plot(minutes, bins["clock_mhz"], color=BLUE)
    axes[3].set_ylabel("SM clock, MHz")
    axes[3].set_xlabel("simulated minutes")
    for event in summary["events"]:
        for axis in axes:
            axis.axvline(event["start_s"] / 60, color=GREY, linewidth=0.8, linestyle="--")
        where = (event["start_s"] / 60, 0.03)
        axes[2].annotate(
            f" {event['name']}", where, xycoords=("data", "axes fraction"), fontsize=SMALL, color="#444444"
        )
    for decision in decisions:
        if decision["event"] in ("drift", "reopen", "adopt"):
            axes[1].annotate(
                decision["event"], (decision["time_s"] / 60, 1.0), xycoords=("data", "axes fraction"), fontsize=SMALL,
                rotation=90, ha="center", va="bottom", color="#444444",
            )  # fmt: skip
    write_titles(
        figure,
        f"SIMULATION, {device}: adaptive chunks in closed loop. {summary['switches']} switches, "
        f"{summary['throughput_over_oracle']:.2%} of an oracle's steps",
        ["Nothing in this figure was measured. The oracle has the best fixed count after every disturbance."],
    )
    target = path / "controller.png"
    figure.savefig(target, dpi=150)
    return target
