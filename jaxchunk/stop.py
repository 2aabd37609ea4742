"""A stop that is asked for from outside: SIGTERM by a scheduler, Ctrl-C by a person."""

import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Any, Self


def no_stop() -> None:
    """In the place of `StopRequest.check` where nobody can ask for a stop."""


class StopRequest:
    """While entered, the first SIGTERM or Ctrl-C only leaves its name in `signal_name`, to be looked at between steps.

    An exception that comes up wherever the program happens to be can leave a lock of Python's own in disorder (that of
    a thread being started, for one), and what then ends the program is another error. A second signal does raise
    KeyboardInterrupt where the program is. A signal that is ignored stays ignored, and in a thread other than the main
    one, which alone may handle signals, nothing changes.
    """

    def __init__(
        self,
        hand_on: Callable[[signal.Signals], None] | None = None,
        signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
    ):
        """With `hand_on` every one of the `signals` is given to that, where the program is, and none raises."""
        self.signal_name: str | None = None
        self._hand_on, self._signals = hand_on, signals
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in self._signals if threading.current_thread() is threading.main_thread() else ():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def check(self) -> None:
        """Raises KeyboardInterrupt where a stop was asked for: called where nothing is half done."""
        if self.signal_name is not None:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._hand_on is None:
            self.check()
        else:
            self._hand_on(signal.Signals(number))
        self.signal_name = signal.Signals(number).name
