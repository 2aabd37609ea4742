"""A program run as part of another one, which stops when that is told to."""

import signal
import subprocess
from collections.abc import Callable, Sequence

from jaxchunk.stop import StopRequest


def run_child(command: Sequence[str], *, on_line: Callable[[str], None] | None = None) -> int:
    """Runs a program to its end.

    It has a session of its own, so that what a terminal sends reaches it once: Ctrl-C is handed on as such, SIGTERM,
    SIGQUIT and SIGHUP as SIGTERM, and what it then does (keep what it has, report) is waited for. At the third it is
    killed. Ctrl-Z stops this program alone.

    Args:
      command: program and arguments.
      on_line: is given every line of its stdout and stderr, without the end; None lets it write where this program
        does.

    Returns:
      Its exit status.

    Raises:
      KeyboardInterrupt: after its end, where this program was told to stop meanwhile, or it says (130) that it was.
    """
    process: subprocess.Popen[str] | None = None
    handed_on = 0

    def hand_on(number: signal.Signals) -> None:
        nonlocal handed_on
        if process is None:
            return
        handed_on += 1
        if handed_on > 2:
            process.kill()
        else:
            process.send_signal(number if number == signal.SIGINT else signal.SIGTERM)

    pipe = None if on_line is None else subprocess.PIPE
    with StopRequest(hand_on, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)) as stop:
        process = subprocess.Popen(
            command, stdout=pipe, stderr=pipe and subprocess.STDOUT, text=True, start_new_session=True
        )
        if stop.signal_name is not None:  # before there was anyone to hand it to
            process.terminate()
        with process:
            if on_line is not None and process.stdout is not None:
                for line in process.stdout:
                    on_line(line.removesuffix("\n"))
            status = process.wait()
    if status == 130:
        raise KeyboardInterrupt
    stop.check()
    return status
