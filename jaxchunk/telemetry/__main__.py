"""Commands about telemetry: `python -m jaxchunk.telemetry doctor` says what this machine can measure."""

from json import dumps
from typing import Literal

import tyro

from jaxchunk.errors import reported_errors
from jaxchunk.telemetry.device import Device, ReadError
from jaxchunk.telemetry.doctor import Clocks, diagnose
from jaxchunk.telemetry.doctor_text import render
from jaxchunk.telemetry.nvml import all_devices, find_device
from jaxchunk.telemetry.rails import find_rails, find_unused

app = tyro.extras.SubcommandApp()


@app.command
def doctor(json: bool = False, seconds: float = 3.0, simulate: Literal["h200", "l40s", "gb10"] | None = None) -> None:
    """Says what can be measured here, how often it is renewed, what asking costs, and where energy will come from.

    Args:
      json: print only JSON.
      seconds: how long each GPU is polled.
      simulate: look at a simulated GPU in place of those of this machine, whose meters are then left alone.
    """
    if simulate is not None:
        device, clocks = _simulated(simulate)
        diagnosis = diagnose([device], seconds=seconds, clocks=clocks)
    else:
        devices = all_devices()
        reason = None if devices else _no_device_reason()
        diagnosis = diagnose(devices, find_rails(), unused=find_unused(), seconds=seconds, no_device_reason=reason)
    print(dumps(diagnosis, indent=2, allow_nan=False) if json else render(diagnosis), end="\n" if json else "")


class _FirstDevice:
    """The first CUDA device, as JAX would name it: JAX itself is not started for this."""

    platform = "gpu"
    local_hardware_id = 0


def _no_device_reason() -> str:
    try:
        find_device(_FirstDevice())
    except ReadError as error:
        return error.reason
    return "NVML lists no GPU that answers, although CUDA has one"


def _simulated(name: str) -> tuple[Device, Clocks]:
    """An idle simulated GPU, and the clocks by which it lives."""
    from jaxchunk.telemetry.simulation import plant, plant_device, profiles, simulated

    clock = simulated.ManualClock()
    profile = {"h200": profiles.H200, "l40s": profiles.L40S, "gb10": profiles.GB10}[name]
    device = plant_device.PlantDevice(plant.Plant(profile), clock)
    return device, Clocks(now=clock, sleep=clock.advance, cpu_s=clock)


def main() -> None:
    """Runs the command that was asked for."""
    with reported_errors():
        app.cli(prog="python -m jaxchunk.telemetry", description=__doc__, use_underscores=True)


if __name__ == "__main__":
    main()
