"""Fits the simulated devices to the measured points and writes what was found into the package (minutes).

`python scripts/calibrate_simulation.py --device gb10` does one. Nothing is measured here.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import tyro

import jaxchunk.simulation
from jaxchunk.errors import reported_errors
from jaxchunk.simulation import calibrate


def fit(device: tuple[Literal["gb10", "l40s", "h200"], ...] = ("gb10", "l40s", "h200")) -> None:
    path = Path(jaxchunk.simulation.__path__[0]) / "data" / "fitted.json"
    fits = json.loads(path.read_text())
    for name in device:
        found = calibrate.calibrate(name)
        fits[name] = dataclasses.asdict(found)
        print(f"{name}: {found}")
        path.write_text(json.dumps(fits, indent=2) + "\n")


def main() -> None:
    with reported_errors():
        tyro.cli(fit, description=__doc__, use_underscores=True)


if __name__ == "__main__":
    main()
