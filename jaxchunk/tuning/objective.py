"""What a chunk count is to be good at."""

from typing import Literal

Objective = Literal["time", "energy", "edp"]
MEANINGS: dict[Objective, str] = {"time": "time", "energy": "energy", "edp": "energy-delay product"}


def cost(objective: Objective, time_s: float, energy_j: float | None) -> float | None:
    """Seconds, joules or their product, of one call or step; None where joules are needed and not known."""
    if objective == "time":
        return time_s
    if energy_j is None or energy_j <= 0:
        return None
    return energy_j if objective == "energy" else energy_j * time_s
