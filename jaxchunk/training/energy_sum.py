"""What all GPUs of all processes have measured, added up where the records are written."""

import dataclasses

from jaxchunk.telemetry import Window
from jaxchunk.telemetry.window import summed
from jaxchunk.training.processes import Processes


def add_up(processes: Processes, name: str, own: Window, *, timeout_s: float | None) -> Window | None:
    """The window of all devices of all processes, in process 0; in others, which only tell theirs, their own.

    The windows are of the same steps, each on the clock of its process; the sum has the times of process 0.

    Args:
      processes: of the run.
      name: of what was measured, the same in all of them.
      own: of this process.
      timeout_s: how long to wait for others; what they do not tell is unknown then, with the reason. None to wait for
        nothing.

    Returns:
      None where others have not told theirs yet and there is to be no waiting.
    """
    if processes.count == 1:
        return own
    if not processes.is_first:
        processes.tell(name, dataclasses.asdict(own))
        return own
    told = processes.wait_for_all(name, timeout_s or 0.0)
    if len(told) < processes.count - 1 and timeout_s is None:
        return None
    processes.forget(name)
    parts = list(own.devices)
    for process in range(1, processes.count):
        if process in told:
            parts += Window.from_dict(told[process]).devices
        else:
            reason = f"process {process} did not say what it measured"
            parts.append(Window.unknown(own.start_s, own.end_s, reason))
    return summed(parts)
