"""How much memory a program may use, on GPUs that share the host's too.

On such a GPU (a DGX Spark's) JAX's habit of taking 75% of the memory at the start can freeze the host.
"""

import dataclasses
import logging
from collections.abc import Callable, MutableMapping
from pathlib import Path

import jax

from jaxchunk import telemetry

_logger = logging.getLogger("jaxchunk")
_VARIABLE = "XLA_PYTHON_CLIENT_PREALLOCATE"
_SHARE_VARIABLES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the old name
_SHARE_BESIDE_OTHERS = 0.5
_USABLE = 0.94  # share of the allocator's limit; the rest goes to fragmentation and library workspaces
_HOST_SHARE = 0.9  # of what is available; the rest is the operating system's
COMPILER_WITHOUT_MEMORY = "the compiler ran out of memory"


def is_unified() -> bool:
    """Whether some GPU of this machine shares the host's memory, by what NVML answers and not by its name."""
    return any(not device.has_own_memory() for device in telemetry.all_devices())


def allocate_as_needed(environment: MutableMapping[str, str], *, beside_others: bool = False) -> None:
    """Keeps JAX from taking memory that others need; to be called before JAX starts its back end.

    Where memory is unified, JAX's preallocation is turned off. Beside another library in this process it keeps to half
    of the memory, in one piece: without preallocation it would take regions that double in size and are never joined
    nor given back, so that twice what its programs need may not be enough for the next one.

    Args:
      environment: usually `os.environ`; a choice that is in it already stands.
      beside_others: whether another library works on the GPU in this process.
    """
    if beside_others and not any(name in environment for name in _SHARE_VARIABLES):
        environment[_SHARE_VARIABLES[0]] = str(_SHARE_BESIDE_OTHERS)
        _logger.info("%s=%s: the rest of the GPU's memory is for others", _SHARE_VARIABLES[0], _SHARE_BESIDE_OTHERS)
    if _VARIABLE not in environment and is_unified():
        environment[_VARIABLE] = "false"
        _logger.info("the GPU shares the host's memory: %s=false, so that JAX takes only what it needs", _VARIABLE)


def limit_bytes(device: jax.Device) -> int | None:
    """What a program may use: the allocator's limit, and on unified memory no more than the host can spare.

    None where the allocator has no limit (a CPU).
    """
    allocator_limit: int | None = (device.memory_stats() or {}).get("bytes_limit")
    if allocator_limit is None or not is_unified():
        return allocator_limit
    return min(allocator_limit, int(_HOST_SHARE * available_bytes()))


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Host memory that can be had without swapping (Linux's MemAvailable)."""
    lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """What a compiled program needs, in bytes: operands and results (donated ones once), and temporaries."""

    operand_bytes: int
    temporary_bytes: int

    @property
    def total_bytes(self) -> int:
        """Everything at once."""
        return self.operand_bytes + self.temporary_bytes


def usable(limit: int | None) -> float:
    """How much of the limit a program may fill."""
    return float("inf") if limit is None else _USABLE * limit


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether the device, or XLA's compiler, was refused memory."""
    return "RESOURCE_EXHAUSTED" in str(error)


def compile_if_it_fits(
    compile_program: Callable[[], jax.stages.Compiled], limit: int | None
) -> tuple[jax.stages.Compiled, ProgramMemory] | str:
    """Compiles a program and checks what it needs against a limit in bytes; says why where it does not fit."""
    try:
        program = compile_program()
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return COMPILER_WITHOUT_MEMORY
    analysis = program.memory_analysis()
    assert analysis is not None, "CPU and GPU back ends have this analysis"
    operands = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    memory = ProgramMemory(operands, analysis.temp_size_in_bytes)
    if limit is not None and memory.total_bytes > usable(limit):
        return f"it needs {memory.total_bytes / 1e9:.2f} of {limit / 1e9:.1f} GB"
    return program, memory
