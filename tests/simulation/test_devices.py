"""Devices as files: what is built in, a file on a base, and errors in the words of who wrote the file."""

import json

import pytest

from jaxchunk.errors import InputError
from jaxchunk.simulation import calibrate, devices

OWN = """
base = "gb10"
[profile]
name = "mine"
[profile.controller]
peak_limit_w = "none"
power_limit_w = 60
[roofline]
bandwidth_bytes_per_s = 2e11
"""


def write(tmp_path, text, name="device.toml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", devices.BUILT_IN)
def test_built_in_devices_have_their_fitted_values(name):
    gpu, fit = devices.load(name.upper()), devices.fit_of(name)
    assert gpu.profile.name.lower() == name
    assert fit["values"].keys() == set(calibrate.FITTED[name])
    tables = devices.tables(name)
    assert all(devices.get_value(tables, key) == value for key, value in fit["values"].items())
    assert len(fit["values"]) <= fit["num_points"]


def test_a_file_changes_what_it_names_and_keeps_the_rest_of_its_base(tmp_path):
    gpu, base = devices.load(write(tmp_path, OWN)), devices.load("gb10")
    assert gpu.profile.name == "mine"
    assert (gpu.profile.controller.peak_limit_w, gpu.profile.controller.power_limit_w) == (None, 60.0)
    assert gpu.roofline.bandwidth_bytes_per_s == 2e11
    assert gpu.roofline.flops_per_s == base.roofline.flops_per_s
    assert gpu.profile.compute == base.profile.compute
    assert gpu.training == base.training


def test_a_complete_file_needs_no_base(tmp_path):
    tables = devices.tables("h200")
    assert devices.load(write(tmp_path, json.dumps(tables), "device.json")) == devices.load("h200")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base = 'gb11'", "base is 'gb11'; it must be one of gb10, l40s, h200"),
        ("base = 'gb10'\n[profile]\nidle = 3", "profile.idle is unknown; known are"),
        (
            "base = 'gb10'\n[profile.controller]\nperiod_s = 'x'",
            "profile.controller.period_s is 'x'; it must be a number",
        ),
        (
            "base = 'gb10'\n[profile.controller]\nperiod_s = -1",
            "controller.period_s is -1.0, needed is a positive number",
        ),
        ("base = 'gb10'\n[roofline]\nbandwidth_bytes_per_s = 0", "bandwidth_bytes_per_s is 0.0, needed is a positive"),
        ("base = 'gb10'\n[roofline.flops_per_s]\nint8 = 1", "needed is one or more of"),
        ("base = 'gb10'\nprofile = 3", "profile is 3; it must be a table"),
        (
            "base = 'l40s'\n[microbenchmark]\ndtype = 'bfloat16'",
            "roofline.flops_per_s has float32; a workload needs bfloat16",
        ),
        ("base = 'gb10'\n[microbenchmark]\nm = 1.5", "microbenchmark.m is 1.5; it must be a whole number"),
        ("base = 'gb10'\n[training]\nmodel = 'gpt'", "training.model is 'gpt'; it must be one of"),
        ("[profile]\nname = 'mine'", "is missing; give it, or name a device to take it from"),
        ("base = ", "is no TOML"),
    ],
)
def test_errors_name_what_was_given_and_what_is_needed(tmp_path, text, words):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        devices.load(path)
    assert words in str(error.value) and "device.toml" in str(error.value)


def test_a_name_that_is_no_device_and_no_file():
    with pytest.raises(InputError, match="b200 is neither one of gb10, l40s, h200 nor a file"):
        devices.load("b200")


def test_phases_that_a_device_does_not_have():
    with pytest.raises(InputError, match="L40S has no training"):
        devices.load("l40s").phases("training", "random", 1)
    with pytest.raises(InputError, match="no training on zero inputs"):
        devices.load("gb10").phases("training", "zero", 1)
