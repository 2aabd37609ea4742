"""Where the milliseconds of a training step go: device time by part and class of kernel, beside the roofline.

`python scripts/step_profile.py RUN_DIR` reads the trace of a run of `train.py --profile_steps 10:15`, and writes
`step_profile.md` and `step_profile.png` there. Without a trace it prints the roofline alone. For kernels of libraries
to be attributed too, train with XLA_FLAGS=--xla_gpu_enable_command_buffer= .
"""

import dataclasses
from pathlib import Path

import tyro

from jaxchunk.bench import step_profile_report
from jaxchunk.errors import reported_errors


@dataclasses.dataclass(frozen=True)
class StepProfileConfig:
    """A run and the rates of its device."""

    run: tyro.conf.Positional[Path]
    """Directory of a run of train.py."""
    peak_tflops: float | None = None
    """What GEMMs reach on the device, TFLOP/s, if it was measured. Default: the data sheet's peak."""
    bandwidth_tbs: float | None = None
    """What memory reaches, TB/s. Default: the data sheet's."""


def main() -> None:
    config = tyro.cli(StepProfileConfig, description=__doc__, use_underscores=True)
    with reported_errors():
        print(step_profile_report.write(config.run, config.peak_tflops, config.bandwidth_tbs))


if __name__ == "__main__":
    main()
