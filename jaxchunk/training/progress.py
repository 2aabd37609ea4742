"""What is shown while a run goes on: a bar on a terminal, a line a step otherwise."""

import sys
from types import TracebackType

from tqdm import tqdm

from jaxchunk.training.records import StepRecord


class Progress:
    """Prints records as they come, with the time that is left; nothing at all where it is `silent`."""

    def __init__(self, total_steps: int, done_steps: int, *, silent: bool = False):
        self._total_steps = total_steps
        self._silent = silent
        self._first: StepRecord | None = None
        self._bar = (
            tqdm(total=total_steps, initial=done_steps, unit="step", dynamic_ncols=True, file=sys.stdout)
            if sys.stdout.isatty() and not silent
            else None
        )

    def step(self, record: StepRecord) -> None:
        """A step is complete."""
        if self._silent:
            return
        if self._bar is None:
            print(record.line(self._total_steps) + self._left(record), flush=True)
        else:
            self._bar.set_description_str(record.line(self._total_steps).split("  ", 1)[1], refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._silent:
            return
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def _left(self, record: StepRecord) -> str:
        """By what all steps after the first took, validation and checkpoints in between included."""
        first = self._first = self._first or record
        if record.step in (first.step, self._total_steps):
            return ""
        per_step_s = (record.time_s - first.time_s) / (record.step - first.step)
        return f"  {_duration(per_step_s * (self._total_steps - record.step))} left"

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _duration(seconds: float) -> str:
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"
