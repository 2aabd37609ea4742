"""Where the device's time goes in a training step, from a trace of `--profile_steps`, beside its roofline.

A kernel is attributed to a part of the step (`roofline.COMPONENTS`) by the scope that its instruction has in the
program, and classed by its name. Kernels inside a CUDA graph are known by name only: a fusion's name leads to its
instruction, a library's kernel stays unattributed. `XLA_FLAGS=--xla_gpu_enable_command_buffer=` does without graphs.
"""

import dataclasses
import gzip
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxchunk.bench.roofline import COMPONENTS, Cost, Rates
from jaxchunk.bench.timeline import classify_kernel
from jaxchunk.errors import InputError
from jaxchunk.measuring.tables import markdown_of_cells
from jaxchunk.training.trace import PROGRAM

CLASSES = ("gemm", "attention", "pallas", "fusion", "copy")
UNATTRIBUTED = "unattributed"
_ATTENTION = re.compile(r"fmha|flash|cudnn|attention", re.I)
_PALLAS = re.compile(r"mosaic|triton_kernel|pallas", re.I)
_INSTRUCTION = re.compile(r'^ *(?:ROOT )?%([\w.\-]+) = .*?metadata=\{[^}]*?op_name="([^"]*)"', re.M)
_SCOPE = re.compile(rf"\b({'|'.join(COMPONENTS)})\b")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One run of one kernel; times in seconds, `self_s` without what runs inside of it and what it waited for."""

    name: str
    kind: str
    component: str
    start_s: float
    end_s: float
    self_s: float


@dataclasses.dataclass(frozen=True)
class StepProfile:
    """Device time of a step, in seconds, the mean over the traced ones.

    Attributes:
      step_s: from the first kernel to the last.
      busy_s: when at least one kernel ran; kernels of several streams may overlap.
      by_part: by component and class of kernel.
      top: the kernels that took the most, with their component.
    """

    step_s: float
    busy_s: float
    by_part: dict[tuple[str, str], float]
    top: list[tuple[str, str, float]]

    @property
    def idle_s(self) -> float:
        """When no kernel ran."""
        return self.step_s - self.busy_s

    def of(self, component: str) -> float:
        """Seconds of a component, all classes together."""
        return sum(seconds for (part, _), seconds in self.by_part.items() if part == component)


def read(directory: Path, steps: int) -> StepProfile:
    """The profile of so many steps that `--profile_steps` left in a directory.

    Raises:
      InputError: there is no trace, or no kernel in it.
    """
    files = sorted(directory.rglob("*.xplane.pb"))
    if not files:
        raise InputError(f"{directory} has no trace (*.xplane.pb): train with --profile_steps, such as 10:15")
    scopes = {}
    if (directory / PROGRAM).exists():
        with gzip.open(directory / PROGRAM, "rt") as file:
            scopes = scopes_of(file.read())
    kernels = list(kernels_of(jax.profiler.ProfileData.from_file(str(files[-1])), scopes))
    if not kernels:
        raise InputError(f"{files[-1]} holds no kernel of a device (CUPTI may be missing, or not permitted)")
    return summarize(kernels, steps)


def scopes_of(program: str) -> dict[str, str]:
    """Names of instructions of an optimised HLO program, as kernels are named after them, and the op that each is."""
    return {re.sub(r"\W", "_", name): op_name for name, op_name in _INSTRUCTION.findall(program)}


def component_of(op_name: str) -> str:
    """The innermost part of the step in the name of an op, such as jit(train_step)/jvp(mlp)/dot_general."""
    found = _SCOPE.findall(op_name)
    return found[-1] if found else UNATTRIBUTED


def kernels_of(profile: Any, scopes: Mapping[str, str]) -> Iterator[Kernel]:
    """The kernels in a `jax.profiler.ProfileData`; on a CPU, where threads run operations, these."""
    planes = [plane for plane in profile.planes if plane.name.startswith("/device:GPU:")]
    on_gpu = bool(planes)
    for plane in planes or profile.planes:
        for line in plane.lines:
            if not on_gpu or line.name.startswith("Stream"):
                yield from _of_line(line.events, scopes, on_gpu)


def _of_line(events: Iterable[Any], scopes: Mapping[str, str], on_gpu: bool) -> Iterator[Kernel]:
    """Kernels of a stream or thread, where one may contain others.

    On a stream a kernel may also begin before the one in front of it has ended (programmatic dependent launch). It
    waits for it then, so the time of both is the earlier one's.
    """
    found = []
    with warnings.catch_warnings():
        # jaxlib 0.11 makes the type of `stats` at its first use, how Python 3.12 deprecates; as an error that aborts.
        warnings.simplefilter("ignore", DeprecationWarning)
        for event in events:
            stats = dict(event.stats)
            if on_gpu or "hlo_op" in stats:
                found.append((event.start_ns, event.start_ns + event.duration_ns, event.name, stats))
    others_ns: dict[int, float] = defaultdict(float)
    open_events: list[int] = []
    found.sort(key=lambda event: (event[0], -event[1]))
    for i, (start_ns, end_ns, _, _) in enumerate(found):
        while open_events and found[open_events[-1]][1] <= start_ns:
            open_events.pop()
        if open_events:
            outer = open_events[-1]
            busy_until_ns = max(found[event][1] for event in open_events)
            if end_ns <= busy_until_ns:
                others_ns[outer] += end_ns - start_ns
            else:
                others_ns[i] += busy_until_ns - start_ns
        open_events.append(i)
    for i, (start_ns, end_ns, name, stats) in enumerate(found):
        instruction = re.sub(r"\W", "_", str(stats.get("hlo_op", name)))
        op_name = str(scopes.get(instruction) or stats.get("tf_op") or stats.get("name") or "")
        yield Kernel(
            name, _kind(name, op_name), component_of(op_name), start_ns / 1e9, end_ns / 1e9,
            (end_ns - start_ns - others_ns[i]) / 1e9,
        )  # fmt: skip


def _kind(name: str, op_name: str) -> str:
    if _PALLAS.search(name) or "pallas_call" in op_name:
        return "pallas"
    kind = classify_kernel(name)
    if kind == "copy":
        return kind
    if _ATTENTION.search(name):
        return "attention"
    return "gemm" if kind == "gemm" else "fusion"


def summarize(kernels: Sequence[Kernel], steps: int, top: int = 12) -> StepProfile:
    """The profile of kernels of so many steps, with the `top` that took the most time."""
    by_part: dict[tuple[str, str], float] = defaultdict(float)
    by_name: dict[tuple[str, str], float] = defaultdict(float)
    for kernel in kernels:
        by_part[kernel.component, kernel.kind] += kernel.self_s / steps
        by_name[kernel.name, kernel.component] += kernel.self_s / steps
    busy_s, reached_s = 0.0, kernels[0].start_s
    for start_s, end_s in sorted((kernel.start_s, kernel.end_s) for kernel in kernels):
        busy_s += max(0.0, end_s - max(start_s, reached_s))
        reached_s = max(reached_s, end_s)
    most = sorted(by_name.items(), key=lambda item: -item[1])[:top]
    span_s = reached_s - min(kernel.start_s for kernel in kernels)
    return StepProfile(span_s / steps, busy_s / steps, dict(by_part), [(*key, seconds) for key, seconds in most])


def table(profile: StepProfile | None, costs: Sequence[Cost], rates: Rates | None) -> str:
    """Parts of a step as a Markdown table, milliseconds each; without a profile or rates, what is known."""
    head = ["part", "TFLOP", "GB", "roofline, ms", "measured, ms", *(f"of it {kind}" for kind in CLASSES)]
    lines = []
    by_name = {cost.component: cost for cost in costs}
    for name in (*COMPONENTS, UNATTRIBUTED):
        cost = by_name.get(name)
        cells = [name, *(_cost_cells(cost, rates) if cost else ["-", "-", "-"])]
        cells.append("-" if profile is None else f"{profile.of(name) * 1e3:.2f}")
        parts = {} if profile is None else profile.by_part
        cells += [f"{parts[name, kind] * 1e3:.2f}" if (name, kind) in parts else "-" for kind in CLASSES]
        lines.append(cells)
    total = Cost(
        "", *(sum(getattr(cost, field) for cost in costs) for field in ("flops", "gemm_bytes", "elementwise_bytes"))
    )
    bound = "-" if rates is None else f"{sum(map(rates.seconds, costs)) * 1e3:.2f}"
    cells = ["all", *_cost_cells(total, None)[:2], bound]
    cells.append("-" if profile is None else f"{sum(profile.by_part.values()) * 1e3:.2f}")
    by_class = {
        kind: sum(s for (_, k), s in (profile.by_part if profile else {}).items() if k == kind) for kind in CLASSES
    }
    cells += [f"{by_class[kind] * 1e3:.2f}" if profile else "-" for kind in CLASSES]
    text = markdown_of_cells(head, [*lines, cells])
    if rates is not None:
        text += f"\n\nRoofline at {rates.flops / 1e12:.3g} TFLOP/s and {rates.bandwidth / 1e12:.3g} TB/s."
    if profile is not None:
        text += f"\nA step takes {profile.step_s * 1e3:.2f} ms of the device, {profile.idle_s * 1e3:.2f} of them idle."
        kernels = ([f"`{name[:90]}`", part, f"{seconds * 1e3:.2f}"] for name, part, seconds in profile.top)
        text += "\n\n" + markdown_of_cells(("kernel", "part", "ms a step"), kernels)
    return text


def _cost_cells(cost: Cost, rates: Rates | None) -> list[str]:
    moved = cost.gemm_bytes + cost.elementwise_bytes
    bound = "-" if rates is None else f"{rates.seconds(cost) * 1e3:.2f}"
    return [f"{cost.flops / 1e12:.3g}", f"{moved / 1e9:.3g}", bound]
