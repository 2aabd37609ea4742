"""Runs the policy of `--lmhead_chunks adaptive` against a simulated GPU: `python scripts/simulate_controller.py`.

Through a cold start, a hot room and a slower fan, beside every fixed count. Nothing of it is a measurement.
"""

import tyro

from jaxchunk.errors import reported_errors
from jaxchunk.simulation import adaptive_run


def main() -> None:
    default = adaptive_run.SimulateControllerConfig()
    config = tyro.cli(adaptive_run.SimulateControllerConfig, default=default, description=__doc__, use_underscores=True)
    with reported_errors():
        adaptive_run.run(config)


if __name__ == "__main__":
    main()
