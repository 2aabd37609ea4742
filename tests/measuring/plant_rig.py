"""A simulated GPU under the measuring protocol, in simulated time: for tests of what is concluded from measurements."""

from jaxchunk.measuring import protocol as protocol_module
from jaxchunk.measuring.protocol import Variant
from jaxchunk.telemetry import Monitor
from jaxchunk.telemetry.simulation.plant import Plant, chunked_iteration
from jaxchunk.telemetry.simulation.plant_device import PlantDevice
from jaxchunk.telemetry.simulation.simulated import ManualClock

STEP_S = 1e-3
COMPUTE_S, MEMORY_S = 0.051, 0.007


class Pending:
    """A result of work that was dispatched and is done when the plant has come so far."""

    nbytes = 4

    def __init__(self, rig):
        self._rig, self.done_s = rig, None

    def block_until_ready(self):
        self._rig.pass_time_until(lambda: self.done_s is not None)
        return self


class Watcher:
    def __init__(self, now):
        self._watched = {}

    def watch(self, key, pending):
        self._watched[key] = pending

    def wait(self, key):
        return self._watched[key].block_until_ready().done_s

    def close(self):
        pass


class Rig:
    """A plant, its instruments and a monitor, in simulated time that passes while somebody waits."""

    def __init__(self, monkeypatch, profile):
        self.clock, self.plant = ManualClock(), Plant(profile)
        self.device = PlantDevice(self.plant, self.clock)
        self.monitor = Monitor(self.device, now=self.clock, cpu_time=lambda: 0.0)
        self._due_s = 0.0
        monkeypatch.setattr(protocol_module, "CompletionWatcher", Watcher)
        monkeypatch.setattr(protocol_module.time, "sleep", self.pass_time)
        monkeypatch.setattr(self.monitor, "wait_ready", lambda end_s, timeout_s: self.pass_time(0.6))

    def pass_time(self, seconds):
        end_s = self.clock() + seconds
        self.pass_time_until(lambda: self.clock() >= end_s)
        return True

    def pass_time_until(self, condition):
        while not condition():
            if self.clock() >= self._due_s:
                self._due_s = self.clock() + self.monitor.sampler.poll_once()
            self.clock.advance(STEP_S)
            self.plant.advance_to(max(self.clock(), self.plant.time_s))

    def variant(self, num_chunks, activity=1.0):
        def call():
            pending = Pending(self)

            def phases():
                yield from chunked_iteration(COMPUTE_S, MEMORY_S, num_chunks, activity=activity)
                pending.done_s = self.plant.time_s

            self.plant.submit(phases())
            return pending

        inputs = "random" if activity == 1.0 else "zero"
        factors = {"inputs": inputs, "chunks": num_chunks, "softmax": "pallas"}
        return Variant(f"{inputs}, {num_chunks}", call, factors=factors)
