"""The probe: each call asked once, three kinds of answer."""

import pytest

from jaxchunk.telemetry import CALLS, NotSupported, ReadFailed, probe
from jaxchunk.telemetry.simulation.simulated import Constant, ManualClock, SimulatedDevice


def device(**options):
    return SimulatedDevice(Constant(500.0), ManualClock(10.0), samples_every_s=0.02, **options)


def test_everything_supported_with_its_value():
    probes = probe(device())
    assert set(probes) == set(CALLS)
    assert all(result.supported and result.reason is None for result in probes.values())
    assert probes["power_instant_w"].value == 500.0
    assert probes["throttle_s"].value == {"sw_power_cap": 0.0, "sw_thermal": 0.0}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NotSupported("NVML_ERROR_NOT_SUPPORTED"), "not_supported"),
        (ReadFailed("NVML_ERROR_NO_PERMISSION"), "failed"),
    ],
)
def test_one_call_missing_leaves_the_others(call, error, status):
    probes = probe(device(failing={call: error}))
    assert probes[call].status == status
    assert probes[call].value is None
    assert probes[call].reason == error.reason
    assert all(result.supported for other, result in probes.items() if other != call)


def test_an_unforeseen_exception_is_a_failure_with_its_text():
    broken = device()
    broken.failing["sm_clock_mhz"] = ZeroDivisionError("division by zero")
    result = probe(broken)["sm_clock_mhz"]
    assert result.status == "failed"
    assert result.reason == "ZeroDivisionError: division by zero"
    assert str(result) == "failed (ZeroDivisionError: division by zero)"


def test_each_call_is_made_once():
    asked = device()
    probe(asked)
    assert asked.calls == dict.fromkeys(CALLS, 1)
