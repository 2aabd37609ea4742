"""The LM-head benchmark at several shapes, one after the other, in one table and one figure.

Every shape is a process of `scripts/bench_lm_head.py` with a directory of its own: what one shape, or a peer's kernel,
does to the device's memory is gone before the next.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

from jaxchunk import plotting
from jaxchunk.bench.child import run_child
from jaxchunk.bench.lm_head_summary import Row, table_of_shapes
from jaxchunk.errors import InputError, RunFailedError
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import BenchConfig
from jaxchunk.run_dir import RunDirectory, new_run_path
from jaxchunk.telemetry import all_devices

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "bench_lm_head.py"
_PATTERN = re.compile(r"(\d+)x(\d+)x(\d+):(\d+(?:,\d+)*)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapesConfig(BenchConfig):
    """Our LM head and those of others, at several shapes."""

    shapes: tuple[str, ...] = ("65536x896x151936:1,8,16", "16384x4096x128256:4", "8192x3584x152064:2")
    """Tokens x width x vocabulary : chunk counts. The default: Qwen2-0.5B, Llama-3 8B, Qwen2.5 7B."""
    peers: tuple[str, ...] = ("all",)
    """LM heads of others, as for bench_lm_head.py."""
    implementations: tuple[str, ...] = ()
    """Ours; none given: the default of bench_lm_head.py on this device."""
    dtype: str | None = None
    """Likewise."""
    window_s: float | None = None
    """Likewise."""


class Shape(NamedTuple):
    """One shape and the chunk counts to measure there."""

    tokens: int
    width: int
    vocab: int
    chunks: tuple[int, ...]

    @property
    def name(self) -> str:
        """For the directory and the table."""
        return f"{self.tokens}x{self.width}x{self.vocab}"


def parse_shape(text: str) -> Shape:
    """A shape from its flag.

    Raises:
      InputError: it is not written as shapes are.
    """
    match = _PATTERN.fullmatch(text)
    if match is None:
        raise InputError(f"--shapes has {text!r}; write tokens x width x vocabulary : chunks, 65536x896x151936:1,8,16")
    tokens, width, vocab = (int(size) for size in match.groups()[:3])
    return Shape(tokens, width, vocab, tuple(int(count) for count in match[4].split(",")))


def run(config: ShapesConfig) -> Path:
    """Measures shape after shape; one that fails does not stop the others.

    Returns:
      The directory, with `table.md`, `shapes.png` and a run of `bench_lm_head.py` for every shape.

    Raises:
      InputError: a flag is out of its domain, or the directory cannot be used.
      RunFailedError: some shape failed; the others are in the table.
      KeyboardInterrupt: it was interrupted; what is measured is in the table, and `--continue` goes on.
    """
    harness.check_common(config)
    shapes = [parse_shape(text) for text in config.shapes]
    if not shapes or len({shape.name for shape in shapes}) < len(shapes):
        raise InputError(f"--shapes is {' '.join(config.shapes)}; give each shape once, with all of its chunk counts")
    if config.shapes == ShapesConfig.shapes and not all_devices():
        raise InputError(
            "the default --shapes take tens of GB, and NVML lists no GPU here; give others, such as 512x64x1024:1,2"
        )
    path = config.out_dir or new_run_path("lm-head-shapes")
    failed: list[str] = []
    with RunDirectory(path, overwrite=config.overwrite, go_on=config.go_on) as directory:
        directory.write_json("shapes.json", [shape.name for shape in shapes])
        try:
            for shape in shapes:
                if config.go_on and harness.is_complete(directory.path / shape.name, config.repeats):
                    print(f"{shape.name} has all of its windows", flush=True)
                    continue
                print(f"{shape.name} ...", flush=True)
                if _measure(shape, config, directory.path) != 0:
                    failed.append(shape.name)
        except KeyboardInterrupt:
            print(f"interrupted: go on with the same flags and --continue --out_dir {directory.path}")
            raise
        finally:
            print(report(directory.path))
    if failed:
        raise RunFailedError(f"failed: {', '.join(failed)}; --continue --out_dir {directory.path} tries again")
    return directory.path


def report(path: Path) -> str:
    """Writes table and figure of the shapes that have a summary; returns what to print."""
    names = [name for name in json.loads((path / "shapes.json").read_text()) if (path / name / "summary.json").exists()]
    if not names:
        return f"nothing is measured yet: {path}"
    rows: dict[str, list[Row]] = {name: json.loads((path / name / "summary.json").read_text()) for name in names}
    text = table_of_shapes(rows)
    (path / "table.md").write_text(text + "\n")
    compared = [path / name for name in names if any(row["time_over_floor"] for row in rows[name])]
    figure = plotting.plot_multiples_of_floor(compared, path / "shapes.png") if compared else "none: no floor fits"
    return f"{text}\nfigure: {figure}\nrecords: {path}"


def _measure(shape: Shape, config: ShapesConfig, path: Path) -> int:
    """Runs the benchmark at a shape; returns its exit status."""
    return run_child([sys.executable, str(_SCRIPT), *_flags(shape, config), "--out_dir", str(path / shape.name)])


def _flags(shape: Shape, config: ShapesConfig) -> list[str]:
    flags: list[object] = [
        "--tokens",
        shape.tokens,
        "--width",
        shape.width,
        "--vocab",
        shape.vocab,
        "--chunks",
        *shape.chunks,
    ]
    flags += ["--repeats", config.repeats, "--settle_s", config.settle_s, "--seed", config.seed]
    flags += ["--peers", *config.peers] if config.peers else []
    flags += ["--implementations", *config.implementations] if config.implementations else []
    flags += ["--dtype", config.dtype] if config.dtype else []
    flags += ["--window_s", config.window_s] if config.window_s else []
    flags += ["--record_telemetry"] if config.record_telemetry else []
    flags += ["--continue"] if config.go_on else []
    return [str(flag) for flag in flags]
