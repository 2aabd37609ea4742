"""TensorBoard and W&B get what is recorded, and cannot stop a run."""

import dataclasses
import importlib.machinery
import json
import struct
import sys
import types

import pytest

from jaxchunk.errors import InputError
from jaxchunk.training import trainer, writers
from jaxchunk.training.config import TrainConfig, validate


def opened(names, path, **changes):
    said = []
    about = {"config": {}, "began_unix_s": 5.0, "done_steps": 0, "say": said.append}
    return writers.open_writers(names, path, **about | changes), said


class FakeWandb(types.ModuleType):
    """Keeps what it is told; fails from the step `broken_at` on."""

    def __init__(self, broken_at=None):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.broken_at, self.logged, self.inits, self.finished = broken_at, [], [], 0

    def init(self, **about):
        self.inits.append(about)
        return self

    def define_metric(self, *names, **options):
        pass

    def log(self, values):
        if self.broken_at is not None and values["step"] >= self.broken_at:
            raise ConnectionError("no network\nmore of it")
        self.logged.append(values)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def read_events(path):
    """(step, name, value) of the event files in a directory: records of length, checksum, protobuf, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack_from("<Q", content)
            event = Event.FromString(content[12 : 12 + length])
            yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
            content = content[12 + length + 4 :]


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_what_is_not_installed_is_named_with_the_remedy(name, module, monkeypatch):
    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda asked: None if asked == module else object())
    with pytest.raises(InputError, match=rf'--log {name}: {module} is not installed; .*"jaxchunk\[{name}\]"'):
        validate(TrainConfig(log=(name,)))
    validate(TrainConfig())


def test_only_what_is_known_is_written(tmp_path, wandb):
    context, said = opened(["wandb", "wandb"], tmp_path)
    with context as writer:
        writer.write({"step": 1, "loss": float("nan"), "mfu": None, "source": "x", "throttle": {"hw": 0.0, "sw": 0.5}})
    assert wandb.logged == [{"step": 1, "throttle/hw": 0.0, "throttle/sw": 0.5}]
    assert wandb.finished == len(wandb.inits) == 1
    assert not said


def test_a_continuation_is_the_same_run(tmp_path, wandb):
    for began_unix_s in (5.0, 5.0, 6.0):
        with opened(["wandb"], tmp_path, began_unix_s=began_unix_s)[0]:
            pass
    first, second, other = (about["id"] for about in wandb.inits)
    assert first == second != other


def test_one_that_fails_is_given_up_with_a_word(tmp_path, wandb):
    wandb.broken_at = 2
    context, said = opened(["wandb"], tmp_path)
    with context as writer:
        for step in (1, 2, 3):
            writer.write({"step": step, "loss": 1.0})
    assert [values["step"] for values in wandb.logged] == [1]
    assert said == ["warning: --log wandb failed (no network): it gets nothing more; the run goes on"]
    wandb.init = None  # cannot even be opened
    context, said = opened(["wandb"], tmp_path)
    with context as writer:
        writer.write({"step": 1, "loss": 1.0})
    assert len(said) == 1


def test_a_run_writes_to_both_what_it_records(config, wandb, tmp_path):
    pytest.importorskip("tensorboardX")
    config = dataclasses.replace(config, log=("tensorboard", "wandb"))
    trainer.train(config)
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    losses = [(values["step"], values["loss"]) for values in wandb.logged if "loss" in values]
    assert losses == [(record["step"], record["loss"]) for record in steps]
    assert [values["step"] for values in wandb.logged if "val_loss" in values] == [5, 10, 12]
    assert not any("energy_j" in values for values in wandb.logged)
    events = list(read_events(run / "tensorboard"))
    written = [(step, pytest.approx(value)) for step, name, value in events if name == "loss"]
    assert losses == written
    assert {name for _, name, _ in events} == {name for values in wandb.logged for name in values} - {"step"}
