"""A program run as part of another one, which stops when that is told to."""

import subprocess
from collections.abc import Callable, Sequence

from jaxchunk.stop import StopRequest


def run_child(command: Sequence[str], *, on_line: Callable[[str], None] | None = None) -> int:
    """Runs a program to its end.

    It has a session of its own, so that Ctrl-C at a terminal reaches it once: Ctrl-C and SIGTERM are handed on, and
    what it then does (keep what it has, report) is waited for.

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

    def hand_on(number: int) -> None:
        if process is not None:
            process.send_signal(number)

    pipe = None if on_line is None else subprocess.PIPE
    with StopRequest(hand_on) as stop:
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
    if status == 130 or stop.signal_name is not None:
        raise KeyboardInterrupt
    return status
