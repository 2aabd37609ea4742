"""Variants that run in a process of their own, of which one at a time has the device.

Two trainers that fill a GPU each cannot hold their memory side by side, and an allocator gives nothing back before its
process ends. So a process does the work, and this one, which holds no memory there, asks it for calls by pipe, takes
the time and reads the energy. Who ran last stays until another one is asked for.
"""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO, Any

import jax

from jaxchunk.errors import RunFailedError
from jaxchunk.measuring.protocol import Variant


def serve(variants: Sequence[Variant], requests: IO[str], answers: IO[str]) -> None:
    """The working process: a line with a variant's number asks for a call; a line of JSON says when it was done.

    Calls are dispatched as they are asked for. The first line says what the variants are.

    Args:
      variants: their calls return something with a `loss`, complete when the call is.
      requests: until it ends.
      answers: for nothing else.
    """

    def answer(record: dict[str, Any]) -> None:
        answers.write(json.dumps(record) + "\n")
        answers.flush()

    def complete() -> None:
        while (result := dispatched.get()) is not None:
            jax.block_until_ready(result)
            answer({"loss": float(result.loss)})
            del result

    answer({"variants": [{"name": v.name, "factors": dict(v.factors)} for v in variants]})
    dispatched: queue.SimpleQueue[Any] = queue.SimpleQueue()
    completing = threading.Thread(target=complete)
    completing.start()
    try:
        for line in requests:
            dispatched.put(variants[int(line)].call())
    finally:
        dispatched.put(None)
        completing.join()


class PendingCall:
    """A call in another process: a leaf for `jax.block_until_ready`, with the loss when it is complete."""

    nbytes = 8

    def __init__(self) -> None:
        """Not complete yet."""
        self._done, self.loss = threading.Event(), float("nan")
        self.problem: str | None = None

    def complete(self, loss: float) -> None:
        """Wakes whoever waits."""
        self.loss = loss
        self._done.set()

    def fail(self, problem: str) -> None:
        """Likewise, with bad news."""
        self.problem = problem
        self._done.set()

    def block_until_ready(self) -> "PendingCall":
        """Waits.

        Raises:
          RunFailedError: the process ended instead.
        """
        self._done.wait()
        if self.problem is not None:
            raise RunFailedError(self.problem)
        return self


class StepProcess:
    """A working process, started; `described` is what it says of its variants."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]):
        """Starts it and waits until its variants are ready.

        Args:
          name: for messages.
          command: what runs `serve` on its standard input and output.
          environment: its variables.

        Raises:
          RunFailedError: it ended before.
        """
        self._name = name
        self._process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is this process's to handle
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self._requests, self._answers = self._process.stdin, self._process.stdout
        self._pending: queue.SimpleQueue[PendingCall] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._ended = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        try:
            first = self._answers.readline()
        except KeyboardInterrupt:
            self._process.kill()
            raise
        self._reader.start()
        if not first:
            self.close()
            raise RunFailedError(self._problem())
        self.described: list[dict[str, Any]] = json.loads(first)["variants"]

    def call(self, number: int) -> PendingCall:
        """Asks for a call of the variant with this number.

        Raises:
          RunFailedError: the process has ended.
        """
        pending = PendingCall()
        with self._sending:
            if self._ended:
                raise RunFailedError(self._problem())
            self._pending.put(pending)
        try:
            self._requests.write(f"{number}\n")
            self._requests.flush()
        except BrokenPipeError:
            raise RunFailedError(self._problem()) from None
        return pending

    def close(self) -> None:
        """Ends it, and with it its memory on the device."""
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._answers.close()
        with contextlib.suppress(BrokenPipeError):  # of what was asked last
            self._requests.close()

    def _read(self) -> None:
        for line in self._answers:
            self._pending.get().complete(json.loads(line)["loss"])
        with self._sending:
            self._ended = True
        while not self._pending.empty():
            self._pending.get().fail(self._problem())

    def _problem(self) -> str:
        return f"{self._name}: its process ended with status {self._process.wait()}; what it said is above"


class StepProcesses:
    """Working processes by name, of which at most one is alive."""

    def __init__(self, commands: Mapping[str, Sequence[str]], environment: Mapping[str, str]):
        """Starts none.

        Args:
          commands: what to run, by name.
          environment: variables of them all.
        """
        self._commands, self._environment = commands, environment
        self._alive: tuple[str, StepProcess] | None = None

    def use(self, name: str) -> StepProcess:
        """The process of this name, alone on the device.

        Raises:
          RunFailedError: it ended before it was ready.
        """
        if self._alive is None or self._alive[0] != name:
            self.close()
            self._alive = name, StepProcess(name, self._commands[name], self._environment)
        return self._alive[1]

    def variants(self, name: str) -> list[Variant]:
        """Its variants; a call of one starts the process where it is not alive.

        Raises:
          RunFailedError: it ended before it was ready.
        """

        def variant(number: int, described: dict[str, Any]) -> Variant:
            return Variant(
                **described,
                call=lambda: self.use(name).call(number),
                prepare=lambda: self.use(name),
                heats_itself=True,
            )

        return [variant(number, described) for number, described in enumerate(self.use(name).described)]

    def close(self) -> None:
        """Ends the one that is alive."""
        if self._alive is not None:
            self._alive[1].close()
            self._alive = None


def own_pipes() -> tuple[IO[str], IO[str]]:
    """Standard input and output for `serve`; what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return sys.stdin, answers
