"""A trace of a few training steps, by JAX's profiler."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import jax

from jaxchunk.errors import InputError


def parse_steps(text: str) -> tuple[int, int]:
    """First and last step of "10:15".

    Raises:
      InputError: it is not written so, or the last step comes before the first.
    """
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or not 1 <= int(first) <= int(last):
        raise InputError(f"--profile_steps is {text}; write the first and the last step, 10:15")
    return int(first), int(last)


class StepTrace:
    """Profiles from where the first step is dispatched to where the last one is done; the steps between are slower.

    Use as a context manager: leaving ends a trace that is still going on.
    """

    def __init__(self, steps: tuple[int, int] | None, directory: Path, say: Callable[[str], None]):
        """Nothing is written before the first step.

        Args:
          steps: first and last, from 1; None for no trace.
          directory: where the trace goes.
          say: takes a line for people.
        """
        self._steps, self._directory, self._say = steps, directory, say
        self._first: int | None = None  # of the trace that is going on

    def before(self, step: int) -> None:
        """Begins, where it is time to. A run that goes on may find itself between the two steps."""
        if self._steps is not None and self._steps[0] <= step <= self._steps[1] and self._first is None:
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._first = step

    def after(self, step: int) -> None:
        """Ends, where it is time to."""
        if self._first is not None and self._steps is not None and step >= self._steps[1]:
            self._end(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._end(None)

    def _end(self, step: int | None) -> None:
        first, self._first, self._steps = self._first, None, None
        jax.profiler.stop_trace()
        until = "the end" if step is None else f"step {step}"
        self._say(
            f"trace from step {first} to {until}: {self._directory}; ui.perfetto.dev opens its perfetto_trace.json.gz, "
            "XProf the directory"
        )
