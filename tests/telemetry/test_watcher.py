"""The completion watcher: order, errors, and no arrays kept alive."""

import gc
import threading
import time
import weakref

import jax.numpy as jnp
import pytest

from jaxchunk.telemetry import CompletionWatcher


class Slow:
    """Something that is complete when told to be, or fails."""

    def __init__(self, error=None):
        self.finish = threading.Event()
        self.error = error

    def block_until_ready(self):
        assert self.finish.wait(10.0)
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture
def watcher():
    watcher = CompletionWatcher()
    yield watcher
    watcher.close()


def test_times_of_completion_not_of_asking(watcher):
    slow = Slow()
    watcher.watch("step", {"loss": slow})
    assert not watcher.done("step")
    time.sleep(0.05)
    finished_s = time.perf_counter()
    slow.finish.set()
    completed_s = watcher.wait("step")
    assert finished_s <= completed_s <= finished_s + 5.0
    assert completed_s <= time.perf_counter()


def test_real_arrays_in_order(watcher):
    for step in range(5):
        watcher.watch(step, jnp.ones(10) * step)
    times_s = [watcher.wait(step) for step in range(5)]
    assert times_s == sorted(times_s)


def test_watch_never_waits(watcher):
    slow, later = Slow(), Slow()
    watcher.watch(0, slow)
    watcher.watch(1, later)
    later.finish.set()
    assert not watcher.done(1)  # in order: 1 is complete after 0
    slow.finish.set()
    assert watcher.wait(0) <= watcher.wait(1)


def test_the_error_of_the_computation_reaches_the_caller(watcher):
    slow = Slow(FloatingPointError("step 7 went wrong"))
    watcher.watch(7, slow)
    watcher.watch(8, jnp.zeros(1))
    slow.finish.set()
    with pytest.raises(FloatingPointError, match="step 7 went wrong"):
        watcher.wait(7)
    assert watcher.wait(8) > 0


@pytest.mark.parametrize("error", [None, ValueError("bad")])
def test_nothing_is_kept_alive_after_completion(watcher, error):
    slow = Slow(error)
    alive = weakref.ref(slow)
    watcher.watch(0, [slow])
    slow.finish.set()
    del slow
    deadline_s = time.monotonic() + 5.0
    while not watcher.done(0) and time.monotonic() < deadline_s:
        time.sleep(0.001)
    gc.collect()
    assert watcher.done(0)
    assert alive() is None
    if error is None:
        watcher.wait(0)


def test_keys(watcher):
    with pytest.raises(KeyError):
        watcher.wait("never given")
    watcher.watch("a", jnp.zeros(1))
    with pytest.raises(ValueError, match="'a' is already being watched"):
        watcher.watch("a", jnp.zeros(1))
    watcher.wait("a")
    with pytest.raises(KeyError):
        watcher.wait("a")
    watcher.watch("a", jnp.zeros(1))  # free again


def test_close_finishes_what_was_asked():
    watcher = CompletionWatcher(now=lambda: 42.0)
    watcher.watch(0, jnp.zeros(1))
    watcher.close()
    watcher.close()
    assert watcher.wait(0) == 42.0
    with pytest.raises(ValueError, match="closed"):
        watcher.watch(1, jnp.zeros(1))
