"""When each step's result was complete, without the training loop ever waiting for the device."""

import queue
import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax


class CompletionWatcher:
    """A thread that waits for arrays in the order in which it was given them, and notes when each was complete.

    JAX returns from a jitted call long before the device is done, so a step's end must be seen from outside the
    loop that dispatches the steps. Give it something that no later step donates (the loss and the metrics, not
    the parameters). It holds the arrays only until they are complete.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        """Starts the thread; `now` is the clock of the times it returns (`Monitor.now`)."""
        self._now = now
        self._queue: queue.SimpleQueue[tuple[Hashable, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._pending: set[Hashable] = set()
        self._results: dict[Hashable, float | BaseException] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="jaxchunk-completion", daemon=True)
        self._thread.start()

    def watch(self, key: Hashable, arrays: Any) -> None:
        """Asks for the completion time of `arrays` (any pytree) under `key`; returns at once.

        Raises:
          ValueError: the key is still in use, or the watcher is closed.
        """
        with self._changed:
            if self._closed:
                raise ValueError("the completion watcher is closed")
            if key in self._pending or key in self._results:
                raise ValueError(f"{key!r} is already being watched: wait for it first")
            self._pending.add(key)
            self._queue.put((key, arrays))

    def done(self, key: Hashable) -> bool:
        """Whether `wait(key)` would return, or raise, at once."""
        with self._changed:
            return key in self._results

    def wait(self, key: Hashable) -> float:
        """Blocks until the arrays of `key` are complete; returns when they were. Forgets the key.

        Raises:
          KeyError: `key` was never given, or was waited for before.
          Exception: whatever the computation of the arrays raised.
        """
        with self._changed:
            if key not in self._pending and key not in self._results:
                raise KeyError(key)
            self._changed.wait_for(lambda: key in self._results)
            result = self._results.pop(key)
        if isinstance(result, BaseException):
            raise result
        return result

    def close(self) -> None:
        """Waits for everything watched and ends the thread. Results can still be collected."""
        with self._changed:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            key, arrays = item
            result = self._complete(arrays)
            del item, arrays  # or they would live until the next ones come
            with self._changed:
                self._pending.discard(key)
                self._results[key] = result
                self._changed.notify_all()
            del result

    def _complete(self, arrays: Any) -> float | BaseException:
        try:
            jax.block_until_ready(arrays)
        except BaseException as error:
            # The traceback would hold this frame, and with it the arrays.
            return error.with_traceback(None)
        return self._now()
