"""What chunking does on simulated GPUs: schedules, calibrated devices, experiments. Nothing here is a measurement.

`devices` reads a device (a profile of the plant in `telemetry.simulation` with a roofline), `schedules` makes the
phases of a workload from the roofline, `experiment` runs them at chunk counts, `calibrate` fits the few parameters
that are fitted. docs/simulation.md has the model, its sources, and what it does not explain.
"""
