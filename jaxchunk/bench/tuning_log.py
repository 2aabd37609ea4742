"""Records of a tuning run: each attempt is written down before it begins and after it ends.

A kernel may hang. Then what has begun is the last thing in the records, and a run that goes on leaves that
configuration alone.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, Protocol

from jaxchunk.bench.kernel_timing import Evaluation
from jaxchunk.errors import RunFailedError, first_line
from jaxchunk.lm_head.kernels.tuned import Config
from jaxchunk.run_dir import RunDirectory, read_json_lines

RECORDS = "records.jsonl"


class Bench(Protocol):
    """What evaluates configurations of a kernel at a shape: `kernel_timing.KernelBench`."""

    def evaluate(self, config: Any) -> Evaluation:
        """Checks a configuration and times it."""

    def call_s(self, config: Any | None) -> float:
        """Seconds of a call; of cuBLAS's plain product where `config` is None."""


class Window(NamedTuple):
    """One window of the final rounds; without a configuration it is cuBLAS's."""

    round: int
    config: Any | None
    milliseconds: float


class TuningLog(Generic[Config]):
    """What was tried at one shape."""

    def __init__(
        self,
        directory: RunDirectory,
        shape: str,
        config_type: type[Config],
        *,
        hang_s: float,
        check: Callable[[], None],
    ):
        """Reads what an earlier run has left; a configuration that it never came back from counts as hung.

        Args:
          directory: of the run.
          shape: its name.
          config_type: of the kernel's configurations.
          hang_s: seconds after which an attempt is given up, and the process with it.
          check: called before each attempt; what it raises ends the search.
        """
        self._directory, self._shape, self._config_type = directory, shape, config_type
        self._hang_s, self._check = hang_s, check
        records = self._records()
        if records and records[-1]["event"] == "trying":
            self._write_hung(records[-1]["config"])

    def known(self) -> dict[Config, Evaluation]:
        """Everything that was evaluated."""
        evaluated = [record for record in self._records() if record["event"] == "evaluated"]
        return {self._config(r["config"]): Evaluation(r["milliseconds"], r["problem"]) for r in evaluated}

    def spent_s(self) -> float:
        """What evaluations took."""
        return sum(record.get("wall_s") or 0.0 for record in self._records() if record["event"] == "evaluated")

    def windows(self) -> list[Window]:
        """Of the last final rounds that were begun."""
        found: list[Window] = []
        for record in self._records():
            if record["event"] == "final":
                found = []
            elif record["event"] == "window":
                config = record["config"]
                found.append(Window(record["round"], config and self._config(config), record["milliseconds"]))
        return found

    def result(self) -> dict[str, Any] | None:
        """How the search ended, once the final rounds are over."""
        return next((record for record in reversed(self._records()) if record["event"] == "tuned"), None)

    def evaluate(self, bench: Bench, config: Config) -> Evaluation:
        """Evaluates a configuration that is not known.

        Raises:
          RunFailedError: the device does not work any more.
        """
        start_s = time.monotonic()
        with self._attempt(config):
            evaluation = bench.evaluate(config)
        wall_s = round(time.monotonic() - start_s, 3)
        self.write("evaluated", config=_fields(config), **evaluation._asdict(), wall_s=wall_s)
        return evaluation

    def time(self, bench: Bench, config: Config | None, number: int) -> None:
        """Measures a window of a final round.

        Raises:
          RunFailedError: it failed, which it did not when it was evaluated.
        """
        with self._attempt(config):
            milliseconds = 1e3 * bench.call_s(config)
        self.write("window", round=number, config=config and _fields(config), milliseconds=milliseconds)

    def write(self, event: str, **details: Any) -> None:
        """Appends a record."""
        self._directory.append(RECORDS, {"event": event, "shape": self._shape, **details})

    @contextlib.contextmanager
    def _attempt(self, config: Config | None) -> Iterator[None]:
        self._check()
        if config is not None:
            self.write("trying", config=_fields(config))
        try:
            with _watchdog(self._hang_s, lambda: self._give_up(config)):
                yield
        except KeyboardInterrupt:
            self.write("interrupted")
            raise
        except Exception as error:
            said = first_line(error)
            if config is not None:
                self.write("evaluated", config=_fields(config), milliseconds=None, problem=said)
            raise RunFailedError(f"{said}; --continue --out_dir {self._directory.path} goes on without it") from error

    def _give_up(self, config: Config | None) -> None:
        """Ends the process: nothing else ends a kernel that hangs."""
        if config is not None:
            self._write_hung(_fields(config))
        what = "cuBLAS" if config is None else _fields(config)
        print(
            f"error: {what} did not come back within {self._hang_s:g} s; go on without it with the same flags and "
            f"--continue --out_dir {self._directory.path}",
            flush=True,
        )
        os._exit(1)

    def _write_hung(self, config: Mapping[str, Any]) -> None:
        self.write("evaluated", config=config, milliseconds=None, problem="hung: it never came back")

    def _records(self) -> list[dict[str, Any]]:
        return [r for r in read_json_lines(self._directory.path / RECORDS) if r["shape"] == self._shape]

    def _config(self, fields: Mapping[str, Any]) -> Config:
        return self._config_type(**fields)


@contextlib.contextmanager
def _watchdog(seconds: float, bark: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, bark)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _fields(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)
