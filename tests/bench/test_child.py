"""A program that runs another one: what becomes of it at Ctrl-C and SIGTERM."""

import signal
import subprocess
import sys

import pytest

from jaxchunk.bench import child
from jaxchunk.bench.child import run_child

SLOW_TO_STOP = """
import os, signal, time
assert os.getsid(0) == os.getpid()  # or a terminal's Ctrl-C would reach it twice
had = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, frame: had.append(number))
print("ready", flush=True)
deadline_s = time.monotonic() + 30
while not had and time.monotonic() < deadline_s:
    time.sleep(0.01)
print("reporting", flush=True)
time.sleep(1.0)
print("kept what there is after", had, flush=True)
"""


@pytest.fixture
def unignored():
    """A shell that starts tests in the background has some signals ignored: they would stay so."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGHUP, signal.SIGQUIT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def program(text):
    return [sys.executable, "-c", text]


@pytest.mark.parametrize(
    ("sent", "had"),
    [
        ([signal.SIGINT], "[2]"),
        ([signal.SIGTERM], "[15]"),
        ([signal.SIGHUP], "[15]"),
        ([signal.SIGQUIT], "[15]"),
        ([signal.SIGINT, signal.SIGINT], "[2, 2]"),
        ([signal.SIGINT, signal.SIGTERM, signal.SIGTERM], None),
    ],
    ids=["int", "term", "hup", "quit", "twice", "thrice"],
)
def test_signals_are_handed_on_and_the_end_waited_for(sent, had, unignored):
    lines, waiting = [], list(sent)
    before = {number: signal.getsignal(number) for number in sent}

    def on_line(line):
        lines.append(line)
        if line == "ready":
            signal.raise_signal(waiting.pop(0))
        while line == "reporting" and waiting:
            signal.raise_signal(waiting.pop(0))

    with pytest.raises(KeyboardInterrupt):
        run_child(program(SLOW_TO_STOP), on_line=on_line)
    kept = [] if had is None else [f"kept what there is after {had}"]  # the third kills
    assert lines == ["ready", "reporting", *kept]
    assert {number: signal.getsignal(number) for number in sent} == before


def test_a_signal_before_there_is_a_child(monkeypatch):
    started = []

    def popen(*arguments, **options):
        signal.raise_signal(signal.SIGINT)
        started.append(subprocess.Popen(*arguments, **options))
        return started[0]

    monkeypatch.setattr(child, "subprocess", type("subprocess", (), {"Popen": popen, "PIPE": -1, "STDOUT": -2}))
    with pytest.raises(KeyboardInterrupt):
        run_child(program("import time; time.sleep(60)"))
    assert started[0].returncode == -signal.SIGTERM


def test_status_and_lines():
    lines = []
    text = "import os; os.write(1, b'out\\n'); os.write(2, b'err\\n'); os.write(1, b'end'); raise SystemExit(3)"
    assert run_child(program(text), on_line=lines.append) == 3
    assert lines == ["out", "err", "end"]
    assert run_child(program("")) == 0
    with pytest.raises(KeyboardInterrupt):
        run_child(program("raise SystemExit(130)"))
