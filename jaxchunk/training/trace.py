"""A trace of a few training steps, by JAX's profiler."""

import gzip
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax

from jaxchunk.errors import InputError

PROGRAM = "train_step.hlo.txt.gz"


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
    """Profiles the steps from the first to the last and no others: the device rests before and after.

    Use as a context manager: leaving ends a trace that is still going on.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: Path,
        say: Callable[[str], None],
        program: Callable[[], str | None],
    ):
        """Nothing is written before the first step.

        Args:
          steps: first and last, from 1; None for no trace.
          directory: where the trace goes.
          say: takes a line for people.
          program: gives the text of the optimised program, which says what the kernels in the trace are; kept there.
        """
        self._steps, self._directory, self._say, self._program = steps, directory, say, program
        self._first: int | None = None  # of the trace that is going on

    def before(self, step: int, state: Any) -> None:
        """Begins or ends, where it is time to, once the device is done with the steps so far, whose result is `state`.

        A run that goes on may find itself between the two steps.
        """
        if self._steps is None:
            return
        if self._first is None and self._steps[0] <= step <= self._steps[1]:
            jax.block_until_ready(state)
            self._keep_program()
            jax.profiler.start_trace(self._directory, create_perfetto_trace=True)
            self._first = step
        elif self._first is not None and step > self._steps[1]:
            jax.block_until_ready(state)
            self._end(step - 1)

    def after(self, step: int) -> None:
        """Ends, where no step comes after the last one. The step is done."""
        if self._first is not None and self._steps is not None and step >= self._steps[1]:
            self._end(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._first is not None:
            self._end(None)

    def _keep_program(self) -> None:
        text = self._program()
        if text is not None:
            self._directory.mkdir(parents=True, exist_ok=True)
            with gzip.open(self._directory / PROGRAM, "wt") as file:
                file.write(text)

    def _end(self, step: int | None) -> None:
        first, self._first, self._steps = self._first, None, None
        jax.profiler.stop_trace()
        until = "the end" if step is None else f"step {step}"
        self._say(
            f"trace from step {first} to {until}: {self._directory}; ui.perfetto.dev opens its perfetto_trace.json.gz, "
            "XProf the directory"
        )
