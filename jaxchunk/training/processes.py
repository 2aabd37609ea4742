"""The processes of a run on several hosts: how they find each other, and what they tell each other beside arrays.

What they tell goes through the key-value store of JAX's coordinator, which process 0 runs: no device waits for it. JAX
has no public name for that store; Orbax uses it in the same way.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax._src import distributed

from jaxchunk.errors import InputError, first_line

_TIMEOUT_S = 1800.0  # for what may take long: reading data, compiling. Who has died is found by JAX's heartbeat.
# A process without one for so long is dead, and JAX ends the others, which wait for it in a collective. JAX's own 100 s
# are paid by every GPU at every crash. A thread of C++ sends heartbeats: neither Python nor a compilation holds it up.
_HEARTBEAT_TIMEOUT_S = 30
# For the others to end after one has: figures are drawn; or one has failed, and they wait for it.
_ENDING_TIMEOUT_S = 60
_runs = itertools.count()


def join(arguments: Sequence[str]) -> None:
    """Connects to the other processes if the command line asks for it; to be called before JAX starts its back end.

    Args:
      arguments: the command line, of which only the flags about processes are looked at: the defaults of the others
        depend on the devices.

    Raises:
      InputError: the flags and the environment do not say who takes part, or the others cannot be reached.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", "--num-processes")
    parser.add_argument("--process_id", "--process-id")
    flags, _ = parser.parse_known_args([argument for argument in arguments if argument != "--distributed=True"])
    given = {name: value for name, value in vars(flags).items() if name != "distributed" and value is not None}
    if not flags.distributed:
        if given:
            raise InputError(f"--{next(iter(given))} is given without --distributed: add it, or leave both out")
        return
    count, index = (_number(name, given.get(name)) for name in ("num_processes", "process_id"))
    # A stop is agreed on by the loop; JAX's own service would take SIGTERM away from it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(flags.coordinator, count, index),
            heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT_S,
            shutdown_timeout_seconds=_ENDING_TIMEOUT_S,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"--distributed: {first_line(error)[:200]}; where no cluster's environment says who takes part, give "
            "--coordinator host:port, --num_processes and --process_id"
        ) from None


def _number(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal():
        raise InputError(f"--{name} is {text}; it must be a whole number")
    return int(text)


@dataclasses.dataclass(frozen=True)
class Processes:
    """All processes of a run, of which this is number `index`. Alone, it hears itself and nothing is sent.

    Every name may be used once in a run. Methods that wait are to be called by all processes, in the same order.
    """

    count: int
    index: int
    run: int

    @classmethod
    def of_jax(cls) -> "Processes":
        """Those that JAX knows, for a run that begins."""
        return cls(jax.process_count(), jax.process_index(), next(_runs))

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.index == 0

    def tell(self, name: str, value: Any) -> None:
        """Gives a JSON value to the others; does not wait for them."""
        _client().key_value_set(self._key(name, self.index), json.dumps(value))

    def heard(self, name: str) -> dict[int, Any]:
        """What processes have told under a name so far, by process. Does not wait."""
        pairs = _client().key_value_dir_get(self._key(name, None))
        return {int(key.rsplit("/", 1)[1]): json.loads(value) for key, value in pairs}

    def forget(self, name: str) -> None:
        """Frees what was told under a name."""
        _client().key_value_delete(self._key(name, None))

    def hear(self, name: str, process: int) -> Any:
        """What a process tells under a name; waits for it.

        Raises:
          InputError: it says nothing for half an hour.
        """
        try:
            return json.loads(_client().blocking_key_value_get(self._key(name, process), int(_TIMEOUT_S * 1e3)))
        except jax.errors.JaxRuntimeError as error:
            reason = first_line(error)[:200]
            raise InputError(f"process {process} did not get as far as {name!r}: {reason}") from None

    def wait_for_all(self, name: str, timeout_s: float) -> dict[int, Any]:
        """What the processes but this one tell under a name within `timeout_s` seconds, by process."""
        deadline_s = time.monotonic() + timeout_s
        while len(told := self.heard(name)) < self.count - 1 and time.monotonic() < deadline_s:
            time.sleep(0.005)
        return told

    def exchange(self, name: str, value: Any) -> list[Any]:
        """What each process gives here, in the order of the processes; waits for all."""
        if self.count == 1:
            return [value]
        self.tell(name, value)
        return [value if process == self.index else self.hear(name, process) for process in range(self.count)]

    def first_does(self, name: str, function: Callable[[], Any]) -> Any:
        """Calls the function in process 0; all get what it returns (a JSON value), or its `InputError`."""
        if self.count == 1:
            return function()
        with self.together(name):
            value = function() if self.is_first else None
        if self.is_first:
            self.tell(f"{name}, result", value)
            return value
        return self.hear(f"{name}, result", 0)

    @contextlib.contextmanager
    def together(self, name: str) -> Iterator[None]:
        """Waits at the end for all to be through with what is inside; an `InputError` of one is raised in all."""
        failure: InputError | None = None
        try:
            yield
        except InputError as error:
            failure = error
        failures = self.exchange(name, None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for process, words in enumerate(failures):
            if words is not None:
                raise InputError(f"process {process}: {words}")

    def check_same(self, name: str, facts: Mapping[str, Any]) -> None:
        """Compares what must be the same in all processes.

        Args:
          name: under which they are exchanged.
          facts: JSON values by what they are called.

        Raises:
          InputError: naming the first that differs, where and how.
        """
        told = self.exchange(name, dict(facts))
        for process, others in enumerate(told[1:], 1):
            for fact, value in told[0].items():
                if others.get(fact) != value:
                    raise InputError(
                        f"{fact} is {others.get(fact)} in process {process} and {value} in process 0: all of them "
                        "need the same flags, data and versions"
                    )

    def _key(self, name: str, process: int | None) -> str:
        return f"jaxchunk/{self.run}/{name}/" + ("" if process is None else str(process))


def _client() -> Any:
    client = distributed.global_state.client
    assert client is not None, "processes that are several have joined"
    return client
