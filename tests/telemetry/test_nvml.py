"""The NVML device against a fake pynvml and a fake libcuda: units, error codes, identity."""

import sys
import types
from types import SimpleNamespace

import pytest

from jaxchunk.telemetry import DeviceNotFound, NotSupported, ReadFailed, find_device, open_monitor, probe
from jaxchunk.telemetry import nvml as nvml_module

NOT_SUPPORTED, NO_PERMISSION, NOT_FOUND, LIBRARY_NOT_FOUND, TIMEOUT = 3, 4, 6, 12, 10
OCTETS = bytes.fromhex("0123456789abcdef00112233445566ff")
PCI = "0000:01:00.0"
UUID = "GPU-01234567-89ab-cdef-0011-2233445566ff"
INSTANT, AVERAGE = (186, 0), (185, 0)  # (field, GPU scope)
UINT, ULL = 1, 3
MEMBERS = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


class FakeError(Exception):
    def __init__(self, value):
        super().__init__(value)
        self.value = value


class FakeNvml(types.ModuleType):
    """A GPU whose fields are {(id, scope): (value type, value)}; what is not there is not supported."""

    NVML_SUCCESS = 0
    NVML_CLOCK_SM = 1
    NVML_TEMPERATURE_GPU = 0
    NVML_FI_DEV_POWER_AVERAGE = 185
    NVML_FI_DEV_POWER_INSTANT = 186
    NVML_POWER_SCOPE_GPU = 0
    NVML_TOTAL_POWER_SAMPLES = 0
    NVML_PERF_POLICY_POWER = 0
    NVML_PERF_POLICY_THERMAL = 1
    NVML_PERF_POLICY_SYNC_BOOST = 2
    NVMLError = FakeError

    def __init__(self):
        super().__init__("pynvml")
        # In the instance, because the module's own dictionary is where the names of errors are looked up.
        self.NVML_ERROR_NOT_SUPPORTED = NOT_SUPPORTED
        self.NVML_ERROR_NO_PERMISSION = NO_PERMISSION
        self.NVML_ERROR_NOT_FOUND = NOT_FOUND
        self.NVML_ERROR_LIBRARY_NOT_FOUND = LIBRARY_NOT_FOUND
        self.NVML_ERROR_TIMEOUT = TIMEOUT
        self.failing = {}
        self.known = {UUID: "handle"}
        self.fields = {
            INSTANT: (UINT, 612_345),
            AVERAGE: (UINT, 590_000),
            (74, 0): (ULL, 3_000_000_000),
            (76, 0): (ULL, 0),
            (269, 0): (ULL, 173_000_000_000),
            (270, 0): (ULL, 400_000_000),
            (271, 0): (ULL, 0),
        }
        self.violations = {}
        answers = {
            "nvmlDeviceGetName": "NVIDIA Test",
            "nvmlDeviceGetUUID": UUID,
            "nvmlDeviceGetTotalEnergyConsumption": 1_234_567,
            "nvmlDeviceGetPowerUsage": 580_000,
            "nvmlDeviceGetEnforcedPowerLimit": 700_000,
            "nvmlDeviceGetPciInfo": SimpleNamespace(busId="00000000:01:00.0"),
            "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=150_000_000_000),
            "nvmlSystemGetDriverVersion": "580.00",
            "nvmlSystemGetCudaDriverVersion_v2": 13010,
            "nvmlInit": None,
        }
        for name, answer in answers.items():
            setattr(self, name, self._function(name, answer))

    def _function(self, name, answer):
        def function(*arguments):
            self._fail(name)
            if name.startswith("nvmlDevice"):
                assert arguments == ("handle",)
            return answer

        return function

    def _fail(self, name):
        if name in self.failing:
            raise FakeError(self.failing[name])

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid not in self.known:
            raise FakeError(NOT_FOUND)
        return self.known[uuid]

    def nvmlDeviceGetSamples(self, handle, kind, after):  # noqa: N802
        self._fail("nvmlDeviceGetSamples")
        assert (handle, kind, after) == ("handle", self.NVML_TOTAL_POWER_SAMPLES, 0)
        values = ((1_700_000_000_000_000, 612_345), (1_700_000_000_020_000, 598_000))
        samples = [SimpleNamespace(timeStamp=t, sampleValue=SimpleNamespace(uiVal=w)) for t, w in values]
        return UINT, samples

    def nvmlDeviceGetClockInfo(self, handle, kind):  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        return 1755

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        return 1980

    def nvmlDeviceGetHandleByPciBusId(self, address):  # noqa: N802
        if address not in self.known:
            raise FakeError(NOT_FOUND)
        return self.known[address]

    def nvmlDeviceGetTemperature(self, handle, sensor):  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return 64

    def nvmlDeviceGetViolationStatus(self, handle, policy):  # noqa: N802
        if policy not in self.violations:
            raise FakeError(NOT_SUPPORTED)
        return SimpleNamespace(referenceTime=1, violationTime=self.violations[policy])

    def nvmlDeviceGetFieldValues(self, handle, fields):  # noqa: N802
        self._fail("nvmlDeviceGetFieldValues")
        return [self._field(*field) for field in fields]

    def _field(self, field, scope):
        answer = self.fields.get((field, scope), NOT_SUPPORTED)
        if isinstance(answer, int):
            return SimpleNamespace(nvmlReturn=answer, valueType=0, value=None)
        value_type, value = answer
        # The other members of the union hold nonsense.
        members = dict.fromkeys(MEMBERS, -1) | {MEMBERS[value_type]: value}
        return SimpleNamespace(nvmlReturn=0, valueType=value_type, value=SimpleNamespace(**members))


class FakeCuda:
    """libcuda with `count` devices, with or without cuDeviceGetUuid_v2."""

    def __init__(self, octets=(OCTETS,), v2=True):
        self._octets = octets
        setattr(self, "cuDeviceGetUuid_v2" if v2 else "cuDeviceGetUuid", self._uuid)

    def cuInit(self, flags):  # noqa: N802
        return 0

    def cuDeviceGet(self, device, ordinal):  # noqa: N802
        if ordinal.value >= len(self._octets):
            return 101
        device._obj.value = 100 + ordinal.value
        return 0

    def cuDeviceGetPCIBusId(self, text, length, device):  # noqa: N802
        text.value = PCI.encode()
        return 0

    def _uuid(self, octets, device):
        octets._obj[:] = self._octets[device.value - 100]
        return 0


@pytest.fixture
def fake_nvml(monkeypatch):
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.fixture
def use_cuda(monkeypatch):
    def use(library):
        def load(name):
            assert name == "libcuda.so.1"
            if isinstance(library, Exception):
                raise library
            return library

        monkeypatch.setattr(nvml_module.ctypes, "CDLL", load)

    use(FakeCuda())
    return use


def gpu(ordinal=0):
    return SimpleNamespace(platform="gpu", local_hardware_id=ordinal)


@pytest.fixture
def device(fake_nvml, use_cuda):
    return find_device(gpu())


@pytest.mark.parametrize("v2", [True, False])
def test_found_by_uuid(fake_nvml, use_cuda, v2):
    use_cuda(FakeCuda(v2=v2))
    device = find_device(gpu())
    assert (device.name, device.uuid) == ("NVIDIA Test", UUID)


def test_the_ordinal_is_cudas_and_the_uuid_decides(fake_nvml, use_cuda):
    use_cuda(FakeCuda([bytes(16), OCTETS]))
    assert find_device(gpu(1)).uuid == UUID
    with pytest.raises(DeviceNotFound, match=r"NVML does not know GPU-00000000-0000-.*: NVML_ERROR_NOT_FOUND"):
        find_device(gpu(0))
    with pytest.raises(DeviceNotFound, match="cuDeviceGet for CUDA device 2 failed with CUresult 101"):
        find_device(gpu(2))


def test_units(device):
    assert device.total_energy_j() == pytest.approx(1234.567)
    assert device.power_instant_w() == pytest.approx(612.345)
    assert device.power_average_w() == pytest.approx(590.0)
    assert device.power_limit_w() == pytest.approx(700.0)
    assert device.sm_clock_mhz() == 1755.0
    assert device.temperature_c() == 64.0
    expected = {"sw_power_cap": 3.0, "sync_boost": 0.0, "sw_thermal": 173.0, "hw_thermal": 0.4, "hw_power_brake": 0.0}
    assert device.throttle_s() == pytest.approx(expected)


def test_a_field_carries_its_own_error(fake_nvml, device):
    fake_nvml.fields[INSTANT] = NOT_SUPPORTED
    with pytest.raises(NotSupported, match="NVML_ERROR_NOT_SUPPORTED"):
        device.power_instant_w()
    fake_nvml.fields[INSTANT] = NO_PERMISSION
    with pytest.raises(ReadFailed, match="NVML_ERROR_NO_PERMISSION"):
        device.power_instant_w()
    fake_nvml.failing["nvmlDeviceGetFieldValues"] = 77
    with pytest.raises(ReadFailed, match="NVML error 77"):
        device.power_instant_w()


def test_a_power_field_of_another_type_is_decoded(fake_nvml, device):
    fake_nvml.fields[INSTANT] = (0, 450_500.0)
    assert device.power_instant_w() == pytest.approx(450.5)


def test_averaged_power_falls_back_once(fake_nvml, device):
    del fake_nvml.fields[AVERAGE]
    assert device.power_average_w() == pytest.approx(580.0)
    fake_nvml.fields[AVERAGE] = (UINT, 1)  # and stays with what worked first
    assert device.power_average_w() == pytest.approx(580.0)


def test_averaged_power_stays_with_the_field(fake_nvml, device):
    assert device.power_average_w() == pytest.approx(590.0)
    del fake_nvml.fields[AVERAGE]
    with pytest.raises(NotSupported):
        device.power_average_w()


def test_the_older_numbering_of_the_slowdown_counters(fake_nvml, device):
    for field in (269, 270, 271):
        del fake_nvml.fields[field, 0]
    fake_nvml.fields |= {(251, 0): (ULL, 5_000_000_000), (252, 0): (ULL, 0), (253, 0): (ULL, 0)}
    throttle = device.throttle_s()
    assert throttle["sw_thermal"] == pytest.approx(5.0)
    assert set(throttle) == {"sw_power_cap", "sync_boost", "sw_thermal", "hw_thermal", "hw_power_brake"}


def test_power_smoothing_settings_are_not_taken_for_counters(fake_nvml, device):
    # The older numbering's driver on a GPU with power smoothing: 269 to 271 are 32-bit settings there.
    fake_nvml.fields |= {(269, 0): (UINT, 2), (270, 0): (UINT, 80), (271, 0): (UINT, 1000)}
    fake_nvml.fields |= {(251, 0): (ULL, 6_000_000_000), (252, 0): (ULL, 0), (253, 0): (ULL, 0)}
    assert device.throttle_s()["sw_thermal"] == pytest.approx(6.0)


def test_throttle_from_violation_status(fake_nvml, device):
    fake_nvml.fields = {}
    fake_nvml.violations = {0: 2_500_000_000, 1: 1_000_000}
    assert device.throttle_s() == pytest.approx({"sw_power_cap": 2.5, "sw_thermal": 0.001})
    fake_nvml.violations[0] = 3_500_000_000
    assert device.throttle_s()["sw_power_cap"] == pytest.approx(3.5)


def test_no_throttle_counters_at_all(fake_nvml, device):
    fake_nvml.fields = {}
    with pytest.raises(NotSupported, match="NVML_ERROR_NOT_SUPPORTED"):
        device.throttle_s()


def test_a_throttle_field_that_fails_later_is_an_error(fake_nvml, device):
    device.throttle_s()
    fake_nvml.fields[74, 0] = TIMEOUT
    with pytest.raises(ReadFailed, match="NVML_ERROR_TIMEOUT"):
        device.throttle_s()


def test_a_spark_like_device(fake_nvml, device):
    """Power limit and memory size not supported, the rest works."""
    fake_nvml.failing = dict.fromkeys(("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetEnforcedPowerLimit"), NOT_SUPPORTED)
    statuses = {call: result.status for call, result in probe(device).items()}
    assert statuses.pop("power_limit_w") == "not_supported"
    assert set(statuses.values()) == {"supported"}
    assert device.describe() == {
        "name": "NVIDIA Test",
        "uuid": UUID,
        "pci_bus_id": "00000000:01:00.0",
        "driver_version": "580.00",
        "cuda_driver_version": "13.1",
        "power_limit_w": None,
        "power_limit_w_null_reason": "NVML_ERROR_NOT_SUPPORTED",
        "memory_total_bytes": None,
        "memory_total_bytes_null_reason": "NVML_ERROR_NOT_SUPPORTED",
    }


def test_open_monitor_with_nvml(fake_nvml, use_cuda, tmp_path):
    monitor = open_monitor(gpu(), csv_path=tmp_path / "telemetry.csv")
    try:
        assert monitor.energy_source == "nvml_total_energy"
        assert monitor.describe()["device"]["power_limit_w"] == 700.0
    finally:
        monitor.stop()


def test_found_by_pci_address_where_the_uuid_is_unknown(fake_nvml, use_cuda):
    fake_nvml.known = {PCI: "handle"}
    assert find_device(gpu()).uuid == UUID


@pytest.mark.parametrize("slices", [1, 3])
def test_a_mig_slice_has_the_meters_of_its_gpu_only_where_it_is_alone(fake_nvml, use_cuda, slices):
    def slice_handle(handle, index):
        if index >= slices:
            raise FakeError(NOT_FOUND)
        return f"slice {index}"

    fake_nvml.known = {UUID.replace("GPU", "MIG"): "slice 0"}
    fake_nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle = lambda handle: {"slice 0": "handle"}[handle]
    fake_nvml.nvmlDeviceGetMaxMigDeviceCount = lambda handle: 7
    fake_nvml.nvmlDeviceGetMigDeviceHandleByIndex = slice_handle
    device = find_device(gpu())
    assert device.describe()["mig_slices"] == slices
    probes = probe(device)
    for call in ("total_energy_j", "power_instant_w", "power_average_w"):
        assert probes[call].supported == (slices == 1)
        assert slices == 1 or probes[call].reason == "3 MIG slices share this GPU's meters"
    assert probes["sm_clock_mhz"].supported


def test_other_processes(fake_nvml, device):
    running = [SimpleNamespace(pid=12, usedGpuMemory=1_000), SimpleNamespace(pid=34, usedGpuMemory=None)]
    fake_nvml.nvmlDeviceGetComputeRunningProcesses = lambda handle: running
    assert device.compute_processes() == [(12, 1_000), (34, None)]


def no_driver(fake_nvml, use_cuda, monkeypatch):
    use_cuda(OSError("libcuda.so.1: cannot open shared object file"))
    return "libcuda.so.1 cannot be loaded: libcuda.so.1: cannot open shared object file"


def no_package(fake_nvml, use_cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    return "the package nvidia-ml-py is not installed (import of pynvml halted; None in sys.modules)"


def no_library(fake_nvml, use_cuda, monkeypatch):
    fake_nvml.failing["nvmlInit"] = LIBRARY_NOT_FOUND
    return "NVML_ERROR_LIBRARY_NOT_FOUND"


def unknown_gpu(fake_nvml, use_cuda, monkeypatch):
    fake_nvml.known = {}
    return f"NVML does not know {UUID}, nor its PCI address: NVML_ERROR_NOT_FOUND"


@pytest.mark.parametrize("trouble", [no_driver, no_package, no_library, unknown_gpu])
def test_open_monitor_without_nvml(fake_nvml, use_cuda, monkeypatch, trouble):
    reason = trouble(fake_nvml, use_cuda, monkeypatch)
    monitor = open_monitor(gpu())
    assert monitor.device is None and monitor.energy_source is None
    assert monitor.window(0.0, 1.0).energy_null_reason == f"NVML not available: {reason}"


def test_all_devices_and_their_memory(fake_nvml):
    fake_nvml.nvmlDeviceGetCount = lambda: 2
    fake_nvml.nvmlDeviceGetHandleByIndex = lambda index: "handle"
    assert [device.has_own_memory() for device in nvml_module.all_devices()] == [True, True]
    fake_nvml.failing["nvmlDeviceGetMemoryInfo"] = NOT_SUPPORTED  # as on a DGX Spark
    assert [device.has_own_memory() for device in nvml_module.all_devices()] == [False, False]
    fake_nvml.failing["nvmlDeviceGetMemoryInfo"] = TIMEOUT  # no answer is not an answer
    assert [device.has_own_memory() for device in nvml_module.all_devices()] == [True, True]
    fake_nvml.failing["nvmlInit"] = LIBRARY_NOT_FOUND
    assert nvml_module.all_devices() == []
