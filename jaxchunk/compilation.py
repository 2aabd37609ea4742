"""Programs compiled once and kept: JAX's persistent cache, and how long compiling took.

What JAX keeps is the compiled program, found again by its whole text: a Pallas kernel's serialised module is a part of
that text (an attribute of its custom call), so another kernel, or other tiles for it, is another program. Two things
follow. On a GPU XLA chooses kernels for GEMMs by timing them, anew at every compilation; a program from the cache has
those that were chosen when it was made, good or bad. And `--deterministic` is a compiler option, which is a part of the
key: such a program is never mistaken for another.
"""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.monitoring

from jaxchunk.stop import StopRequest

_HIT = "/jax/compilation_cache/cache_hits"
_MOST_BYTES = 4 * 10**9  # a training step has some 10 MB
_LEAST_COMPILE_S = 0.5  # what compiles faster is not worth a file, unless the user says so in JAX's own variable
_LEAST_COMPILE_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
_hits = threading.local()  # JAX tells of a hit in the thread that compiles


class CompileTime(NamedTuple):
    """Where the time before a program's first call went.

    Attributes:
      lower_s: seconds to trace it and lower it to StableHLO.
      compile_s: seconds of XLA, or of loading it from the cache.
      from_cache: whether it was loaded.
    """

    lower_s: float
    compile_s: float
    from_cache: bool

    @property
    def total_s(self) -> float:
        """Seconds."""
        return self.lower_s + self.compile_s


def keep_programs(cache_dir: Path) -> None:
    """Has JAX keep compiled programs under `cache_dir` for later processes; to be called before the first compilation.

    A directory that was chosen already, in JAX_COMPILATION_CACHE_DIR or in `jax.config`, stays, with its limits.
    The least recently used programs go when there are more than 4 GB. Who can write there can run code here: JAX loads
    what it finds.

    Some CPUs refuse to load what they compiled, with a line of XLA's log, and compile anew (jax-ml/jax issue 38445).

    Of XLA's own caches beside it none is turned on. That of kernels loses what a kernel with TMA needs (openxla/xla
    issue 35951), and that of timings would hand choices made by timing to `--deterministic`.
    """
    if not jax.config.values["jax_enable_compilation_cache"] or program_cache() is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "programs"))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    if _LEAST_COMPILE_VARIABLE not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _LEAST_COMPILE_S)
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def program_cache() -> str | None:
    """The directory that programs are kept in; None where they are not."""
    directory: str | None = jax.config.values["jax_compilation_cache_dir"]
    return directory if jax.config.values["jax_enable_compilation_cache"] else None


def compile_timed(
    function: jax.stages.Wrapped, *arguments: object, options: dict[str, str | bool] | None = None
) -> tuple[jax.stages.Compiled, CompileTime]:
    """Lowers and compiles a jitted function for arguments, arrays or their shapes; says how long that took.

    Raises:
      KeyboardInterrupt: Ctrl-C or SIGTERM came meanwhile. It is raised between the two or after them: raised within,
        it has JAX 0.10 end the process with a segmentation fault.
    """
    start_s, hits = time.perf_counter(), _hits_here()
    with StopRequest() as stop:
        lowered = function.lower(*arguments)
        lowered_s = time.perf_counter()
        stop.check()
        program = lowered.compile(options)
        compiled_s = time.perf_counter()
        stop.check()
    return program, CompileTime(lowered_s - start_s, compiled_s - lowered_s, _hits_here() > hits)


def sum_of(times: Sequence[CompileTime]) -> CompileTime:
    """The time of several compilations together; from the cache, if all of them were."""
    lower_s, compile_s, from_cache = zip(*times, strict=True)
    return CompileTime(sum(lower_s), sum(compile_s), all(from_cache))


def _hits_here() -> int:
    return getattr(_hits, "count", 0)


def _count(event: str, **_: object) -> None:
    if event == _HIT:
        _hits.count = _hits_here() + 1


jax.monitoring.register_event_listener(_count)
