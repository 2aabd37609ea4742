"""What chunking does on a simulated GPU: gb10 (DGX Spark), l40s, h200, or a device of your own in a file.

`python scripts/simulate.py --device gb10 --out_dir runs/gb10` takes a minute or two on one CPU core and writes records,
a table and a figure. Nothing is measured: docs/simulation.md says what the model is, and what it does not explain.
"""

import logging

import tyro

from jaxchunk.errors import reported_errors
from jaxchunk.simulation import report


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    config = tyro.cli(report.SimulationConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        report.run(config)


if __name__ == "__main__":
    main()
