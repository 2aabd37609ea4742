"""A GPU read through NVML (the module `pynvml` of the package nvidia-ml-py), imported only when asked for."""

import ctypes
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import Any, Protocol

from jaxchunk.telemetry.device import DeviceNotFound, NotSupported, PowerSamples, ReadError, ReadFailed

# nvml.h, nvmlDeviceGetTotalEnergyConsumption: "in millijoules (mJ) since the driver was last reloaded".
ENERGY_UNIT_J = 1e-3
# nvml.h, NVML_FI_DEV_POWER_*, nvmlDeviceGetPowerUsage, ...EnforcedPowerLimit: milliwatts.
POWER_UNIT_W = 1e-3
# nvml.h, nvmlViolationTime_t: "violationTime in Nanoseconds"; DCGM calls the field values ..._NS too.
THROTTLE_UNIT_S = 1e-9
# nvml.h, nvmlSample_t: "CPU Timestamp in microseconds"; NVML_TOTAL_POWER_SAMPLES are in milliwatts.
SAMPLE_TIME_UNIT_S = 1e-6

# Field ids that never moved: the NVML_FI_DEV_PERF_POLICY_* counters, under whose ids
# CLOCKS_EVENT_REASON_SW_POWER_CAP and ..._SYNC_BOOST are aliases.
_STABLE_THROTTLE_FIELDS = {"sw_power_cap": 74, "sync_boost": 76}
# The other three moved, and within one driver branch: nvidia-ml-py 12.575 to 13.580.82 numbers them 251 to 253,
# 13.580.126 and later 269 to 271, and each numbering gives the other's ids to the power-smoothing settings.
# The ids of the installed pynvml are therefore no proof: the device is asked, see `_slowdown_fields`.
_SLOWDOWN_REASONS = ("sw_thermal", "hw_thermal", "hw_power_brake")
_SLOWDOWN_NUMBERINGS = ((269, 270, 271), (251, 252, 253))

_VALUE_MEMBER = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by NVML_VALUE_TYPE_*
_64_BIT_COUNTERS = (2, 3)  # NVML_VALUE_TYPE_UNSIGNED_LONG, ..._UNSIGNED_LONG_LONG


class JaxDevice(Protocol):
    """The part of a `jax.Device` that is needed to find it again."""

    @property
    def platform(self) -> str:
        """`cpu`, `gpu`, ..."""

    @property
    def local_hardware_id(self) -> int | None:
        """The CUDA ordinal, counted after `CUDA_VISIBLE_DEVICES`."""


def find_device(jax_device: JaxDevice) -> "NvmlDevice":
    """Finds the GPU of a JAX device by its UUID: CUDA and NVML number the GPUs differently.

    Raises:
      DeviceNotFound: no driver, no NVML, or NVML knows no GPU with that UUID.
      ReadFailed, NotSupported: NVML does not even tell the GPU's name.
    """
    ordinal = jax_device.local_hardware_id
    if ordinal is None:
        raise DeviceNotFound(f"JAX gives no CUDA ordinal for {jax_device}")
    identity = cuda_uuid(ordinal)
    nvml = _load_nvml()
    try:
        return NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}"))
    except nvml.NVMLError as error:
        reason = _error_name(nvml, error.value)
    with suppress(nvml.NVMLError):
        return _mig_device(nvml, nvml.nvmlDeviceGetHandleByUUID(f"MIG-{identity}"))
    with suppress(nvml.NVMLError, DeviceNotFound):
        return NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByPciBusId(cuda_pci_bus_id(ordinal)))
    raise DeviceNotFound(f"NVML does not know GPU-{identity}, nor its PCI address: {reason}")


def _mig_device(nvml: ModuleType, mig_handle: Any) -> "NvmlDevice":
    """The GPU of a MIG slice: NVML has meters for the whole GPU only."""
    parent = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(mig_handle)
    slices = 0
    for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(parent)):
        with suppress(nvml.NVMLError):
            nvml.nvmlDeviceGetMigDeviceHandleByIndex(parent, index)
            slices += 1
    return NvmlDevice(nvml, parent, mig_slices=slices)


def all_devices() -> "list[NvmlDevice]":
    """Every GPU that NVML knows, in its own order; none where there is no NVML."""
    try:
        nvml = _load_nvml()
    except DeviceNotFound:
        return []
    try:
        return [NvmlDevice(nvml, nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(nvml.nvmlDeviceGetCount())]
    except (nvml.NVMLError, ReadError):
        return []


def cuda_uuid(ordinal: int) -> str:
    """UUID of a CUDA device, in hexadecimal; NVML writes `GPU-` before it or, for a MIG slice, `MIG-`.

    Raises:
      DeviceNotFound: libcuda is missing or refuses.
    """
    octets = (ctypes.c_ubyte * 16)()

    def ask(cuda: ctypes.CDLL, device: ctypes.c_int) -> int:
        # With MIG only _v2 tells the slice apart; drivers before 11.4 have only the first.
        get_uuid = getattr(cuda, "cuDeviceGetUuid_v2", None) or cuda.cuDeviceGetUuid
        return int(get_uuid(ctypes.byref(octets), device))

    _ask_cuda(ordinal, "cuDeviceGetUuid", ask)
    return str(uuid.UUID(bytes=bytes(octets)))


def cuda_pci_bus_id(ordinal: int) -> str:
    """PCI address of a CUDA device, as `0000:01:00.0`.

    Raises:
      DeviceNotFound: libcuda is missing or refuses.
    """
    text = ctypes.create_string_buffer(32)
    _ask_cuda(
        ordinal,
        "cuDeviceGetPCIBusId",
        lambda cuda, device: int(cuda.cuDeviceGetPCIBusId(text, ctypes.c_int(len(text)), device)),
    )
    return text.value.decode()


def _ask_cuda(ordinal: int, name: str, ask: Callable[[ctypes.CDLL, ctypes.c_int], int]) -> None:
    """Asks libcuda about a device; JAX has started it, or it starts without a context.

    Raises:
      DeviceNotFound: libcuda is missing or refuses.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise DeviceNotFound(f"libcuda.so.1 cannot be loaded: {error}") from error
    device = ctypes.c_int()
    steps: tuple[tuple[str, Callable[[], int]], ...] = (
        ("cuInit", lambda: cuda.cuInit(ctypes.c_uint(0))),
        ("cuDeviceGet", lambda: cuda.cuDeviceGet(ctypes.byref(device), ctypes.c_int(ordinal))),
        (name, lambda: ask(cuda, device)),
    )
    for step, call in steps:
        status = call()
        if status != 0:
            raise DeviceNotFound(f"{step} for CUDA device {ordinal} failed with CUresult {status}")


def _load_nvml() -> ModuleType:
    try:
        import pynvml
    except ImportError as error:
        raise DeviceNotFound(f"the package nvidia-ml-py is not installed ({error})") from error
    try:
        pynvml.nvmlInit()  # counted by NVML; the process's end undoes it
    except pynvml.NVMLError as error:
        raise DeviceNotFound(_error_name(pynvml, error.value)) from error
    module: ModuleType = pynvml
    return module


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _error_name(nvml: ModuleType, code: int) -> str:
    for name, value in vars(nvml).items():
        if name.startswith("NVML_ERROR_") and value == code:
            return name
    return f"NVML error {code}"


class NvmlDevice:
    """One GPU behind an NVML handle; `jaxchunk.telemetry.device.Device` says what the methods mean.

    Where a quantity has two ways to be read, the first call finds the way that works and later calls keep to it.
    """

    def __init__(self, nvml: ModuleType, handle: Any, *, mig_slices: int = 0):
        """Takes a handle; `mig_slices` is how many MIG slices the GPU is cut into, where JAX runs on one of them."""
        self._nvml = nvml
        self._handle = handle
        self._mig_slices = mig_slices
        self.name: str = self._call("nvmlDeviceGetName")
        self.uuid: str = self._call("nvmlDeviceGetUUID")
        self._has_average_field: bool | None = None  # None: not asked yet
        self._throttle_fields: dict[str, int] | None = None
        self._throttle_policies: dict[str, int] = {}

    def total_energy_j(self) -> float:
        """See `Device`."""
        self._refuse_shared_meter()
        return float(self._call("nvmlDeviceGetTotalEnergyConsumption")) * ENERGY_UNIT_J

    def power_instant_w(self) -> float:
        """See `Device`."""
        self._refuse_shared_meter()
        return self._power_field(self._nvml.NVML_FI_DEV_POWER_INSTANT)

    def power_average_w(self) -> float:
        """See `Device`. The field value, or nvmlDeviceGetPowerUsage where the field is not there."""
        self._refuse_shared_meter()
        if self._has_average_field is not False:
            try:
                value = self._power_field(self._nvml.NVML_FI_DEV_POWER_AVERAGE)
                self._has_average_field = True
                return value
            except ReadError:
                if self._has_average_field:
                    raise
                self._has_average_field = False
        return float(self._call("nvmlDeviceGetPowerUsage")) * POWER_UNIT_W

    def power_samples_w(self) -> PowerSamples:
        """See `Device`. Their clock is the system's, which may be set while a run goes on."""
        self._refuse_shared_meter()
        _, samples = self._call("nvmlDeviceGetSamples", self._nvml.NVML_TOTAL_POWER_SAMPLES, 0)
        asked_s = time.time()
        return PowerSamples(
            asked_s, [(s.timeStamp * SAMPLE_TIME_UNIT_S, s.sampleValue.uiVal * POWER_UNIT_W) for s in samples]
        )

    def sm_clock_mhz(self) -> float:
        """See `Device`."""
        return float(self._call("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM))

    def temperature_c(self) -> float:
        """See `Device`."""
        return float(self._call("nvmlDeviceGetTemperature", self._nvml.NVML_TEMPERATURE_GPU))

    def power_limit_w(self) -> float:
        """See `Device`."""
        return float(self._call("nvmlDeviceGetEnforcedPowerLimit")) * POWER_UNIT_W

    def sm_clock_max_mhz(self) -> float:
        """See `Device`."""
        return float(self._call("nvmlDeviceGetMaxClockInfo", self._nvml.NVML_CLOCK_SM))

    def throttle_s(self) -> dict[str, float]:
        """See `Device`. From field values; a reason without one from nvmlDeviceGetViolationStatus."""
        if self._throttle_fields is None:
            self._find_throttle_counters()
        assert self._throttle_fields is not None
        seconds = {}
        if self._throttle_fields:
            values = self._fields([(field, 0) for field in self._throttle_fields.values()])
            for reason, (_, value) in zip(self._throttle_fields, values, strict=True):
                if isinstance(value, ReadError):
                    raise value
                seconds[reason] = value * THROTTLE_UNIT_S
        for reason, policy in self._throttle_policies.items():
            violation = self._call("nvmlDeviceGetViolationStatus", policy)
            seconds[reason] = violation.violationTime * THROTTLE_UNIT_S
        return seconds

    def compute_processes(self) -> list[tuple[int, int | None]]:
        """Process ids that compute on the GPU, with the bytes of its memory that each holds where that is known.

        Raises:
          NotSupported, ReadFailed: NVML does not say.
        """
        processes = self._call("nvmlDeviceGetComputeRunningProcesses")
        return [(int(process.pid), process.usedGpuMemory) for process in processes]

    def has_own_memory(self) -> bool:
        """Whether the GPU has memory apart from the host's; NVML reports no memory for a DGX Spark's."""
        try:
            self._call("nvmlDeviceGetMemoryInfo")
        except NotSupported:
            return False
        except ReadError:
            return True
        return True

    def describe(self) -> dict[str, object]:
        """See `Device`. What the GPU does not tell is None, and `<key>_null_reason` says why."""
        queries: dict[str, Callable[[], object]] = {
            "pci_bus_id": lambda: _text(self._call("nvmlDeviceGetPciInfo").busId),
            "driver_version": lambda: self._call("nvmlSystemGetDriverVersion", device=False),
            "cuda_driver_version": self._cuda_driver_version,
            "power_limit_w": self.power_limit_w,
            "memory_total_bytes": lambda: int(self._call("nvmlDeviceGetMemoryInfo").total),
        }
        facts: dict[str, object] = {"name": self.name, "uuid": self.uuid}
        if self._mig_slices:
            facts["mig_slices"] = self._mig_slices
        for key, query in queries.items():
            try:
                facts[key] = query()
            except ReadError as error:
                facts[key] = None
                facts[f"{key}_null_reason"] = error.reason
        return facts

    def _refuse_shared_meter(self) -> None:
        if self._mig_slices > 1:
            raise NotSupported(f"{self._mig_slices} MIG slices share this GPU's meters")

    def _cuda_driver_version(self) -> str:
        version = self._call("nvmlSystemGetCudaDriverVersion_v2", device=False)  # 13000 is 13.0
        return f"{version // 1000}.{version % 1000 // 10}"

    def _call(self, function: str, *arguments: Any, device: bool = True) -> Any:
        """Calls NVML, on this device unless told otherwise, and gives its errors our names."""
        leading = (self._handle,) if device else ()
        try:
            return getattr(self._nvml, function)(*leading, *arguments)
        except self._nvml.NVMLError as error:
            raise self._error(error.value) from error

    def _error(self, code: int) -> ReadError:
        reason = _error_name(self._nvml, code)
        return NotSupported(reason) if code == self._nvml.NVML_ERROR_NOT_SUPPORTED else ReadFailed(reason)

    def _fields(self, fields: list[tuple[int, int]]) -> list[tuple[int, float | ReadError]]:
        """Reads (field id, scope id) pairs in one call: for each its value type, and the value or its own error."""
        results: list[tuple[int, float | ReadError]] = []
        try:
            values = self._call("nvmlDeviceGetFieldValues", fields)
        except ReadError as error:
            return [(-1, error)] * len(fields)
        for field in values:
            # The call as a whole succeeds even where a field does not: each has its own return code.
            if field.nvmlReturn != self._nvml.NVML_SUCCESS:
                results.append((-1, self._error(field.nvmlReturn)))
            else:
                results.append((field.valueType, getattr(field.value, _VALUE_MEMBER[field.valueType])))
        return results

    def _power_field(self, field: int) -> float:
        # GPU scope: a DGX Spark answers that one and not the module's.
        ((_, value),) = self._fields([(field, self._nvml.NVML_POWER_SCOPE_GPU)])
        if isinstance(value, ReadError):
            raise value
        return value * POWER_UNIT_W

    def _find_throttle_counters(self) -> None:
        """Decides, once, where each reason's counter is read.

        Raises:
          NotSupported, ReadFailed: no reason has a counter; the error of the last one tried.
        """
        fields = self._slowdown_fields()
        last_error: ReadError = NotSupported("no counter")
        for reason, field in _STABLE_THROTTLE_FIELDS.items():
            ((_, value),) = self._fields([(field, 0)])
            if isinstance(value, ReadError):
                last_error = value
            else:
                fields[reason] = field
        policies = {
            "sw_power_cap": self._nvml.NVML_PERF_POLICY_POWER,
            "sw_thermal": self._nvml.NVML_PERF_POLICY_THERMAL,
            "sync_boost": self._nvml.NVML_PERF_POLICY_SYNC_BOOST,
        }
        for reason, policy in policies.items():
            if reason in fields:
                continue
            try:
                self._call("nvmlDeviceGetViolationStatus", policy)
            except ReadError as error:
                last_error = error
            else:
                self._throttle_policies[reason] = policy
        if not fields and not self._throttle_policies:
            raise last_error
        self._throttle_fields = fields

    def _slowdown_fields(self) -> dict[str, int]:
        """The field ids of the three counters that moved, or none.

        A numbering is believed when all three answer and are 64-bit: the power-smoothing settings that have the
        same ids in the other numbering are 32-bit, and exist only on some GPUs.
        """
        for numbering in _SLOWDOWN_NUMBERINGS:
            answers = self._fields([(field, 0) for field in numbering])
            if all(value_type in _64_BIT_COUNTERS for value_type, _ in answers):
                return dict(zip(_SLOWDOWN_REASONS, numbering, strict=True))
        return {}
