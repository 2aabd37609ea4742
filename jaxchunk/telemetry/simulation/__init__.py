"""GPUs that are not there: for tests, and for asking what would happen. No figure from here is a measurement.

`simulated` has a device over a power that is given; `plant` one in a closed loop, with `profiles` of real products,
uncalibrated, and the instruments of `plant_device`.
"""
