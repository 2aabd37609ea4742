"""Which kernel ran when on the GPU: a few calls under JAX's profiler, kept as one JSON line a kernel."""

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from jaxchunk.errors import InputError
from jaxchunk.run_dir import read_json_lines

KINDS = ("gemm", "softmax", "copy", "other")
# In this order, for cuBLAS has GEMM kernels called splitKreduce. XLA names a kernel in words joined by underscores.
_PATTERNS = (
    ("copy", re.compile(r"(?<![a-z])mem(cpy|set)", re.I)),
    ("gemm", re.compile(r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitk|(?<![a-z0-9])(sm\d+_|dot(?![a-z]))", re.I)),
    ("softmax", re.compile(r"softmax|(?<![a-z])(exp|exponential|reduce|divide)(?![a-z])", re.I)),
)


@dataclasses.dataclass(frozen=True)
class KernelSpan:
    """One run of one kernel.

    Attributes:
      name: the kernel's, as the profiler has it.
      kind: one of `KINDS`.
      start_s: seconds since the first kernel of the timeline began.
      duration_s: seconds that it ran.
    """

    name: str
    kind: str
    start_s: float
    duration_s: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The kernels of some calls.

    Attributes:
      spans: every kernel, copy and memset in order of their starts; those of several streams may overlap.
      null_reason: why there are none, or None.
    """

    spans: tuple[KernelSpan, ...]
    null_reason: str | None = None


def record_timeline(
    call: Callable[[], Any], path: str | Path, *, calls: int = 3, softmax_kernels: Collection[str] = ()
) -> Timeline:
    """Runs `call` under JAX's profiler and writes the kernels to a JSON-lines file.

    One call goes before, so that no compilation is traced. The traced calls follow each other without a pause. The
    profiler slows kernels a little and delays their launches: take no measurement of speed from it.

    Args:
      call: dispatches the work once and returns arrays that are ready when it is done.
      path: of the file, `timeline.jsonl`; not written where there is nothing to write.
      calls: traced calls.
      softmax_kernels: names known to be the softmax's (`softmax_workload.softmax_kernels`).

    Returns:
      The timeline; on a machine without a GPU an empty one with the reason.

    Raises:
      InputError: `calls` is less than 1.
    """
    if calls < 1:
        raise InputError(f"calls is {calls}; it must be at least 1")
    jax.block_until_ready(call())
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0  # what the host does is not asked for
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory, profiler_options=options):
            result = None
            for _ in range(calls):
                result = None  # before the call, so that two sets of results never exist at once
                result = call()
            jax.block_until_ready(result)
            del result
        files = sorted(Path(directory).rglob("*.xplane.pb"))
        if not files:
            return Timeline((), "the profiler wrote no trace")
        timeline = extract_timeline(jax.profiler.ProfileData.from_file(str(files[0])), softmax_kernels)
    if timeline.spans:
        write_timeline(timeline.spans, path)
    return timeline


def extract_timeline(profile: Any, softmax_kernels: Collection[str] = ()) -> Timeline:
    """The kernels in a profile.

    Args:
      profile: a `jax.profiler.ProfileData`.
      softmax_kernels: names known to be the softmax's.
    """
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU:")]
    if not planes:
        return Timeline((), "the profile holds no GPU")
    events = sorted(_stream_events(planes), key=lambda event: event.start_ns)
    if not events:
        return Timeline((), "the profile holds no kernel of the GPU (CUPTI may be missing, or not permitted)")
    first_ns = events[0].start_ns
    return Timeline(
        tuple(
            KernelSpan(
                name=event.name,
                kind=classify_kernel(event.name, softmax_kernels),
                start_s=(event.start_ns - first_ns) / 1e9,
                duration_s=event.duration_ns / 1e9,
            )
            for event in events
        )
    )


def classify_kernel(name: str, softmax_kernels: Collection[str] = ()) -> str:
    """The kind of a kernel, one of `KINDS`, by its name; "other" for a name that tells nothing.

    A name in `softmax_kernels` is the softmax's, whatever it looks like.
    """
    if name in softmax_kernels:
        return "softmax"
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), "other")


def write_timeline(spans: Iterable[KernelSpan], path: str | Path) -> None:
    """Writes one JSON line a kernel."""
    Path(path).write_text("".join(json.dumps(dataclasses.asdict(span), allow_nan=False) + "\n" for span in spans))


def read_timeline(path: str | Path) -> list[KernelSpan]:
    """Reads what `write_timeline` wrote; empty where there is no file."""
    return [KernelSpan(**record) for record in read_json_lines(path)]


def _stream_events(planes: Iterable[Any]) -> Iterator[Any]:
    """Events of the planes' streams; other lines (modules, operations, scopes) repeat the same time in other words."""
    for plane in planes:
        for line in plane.lines:
            if line.name.startswith("Stream"):
                yield from line.events
