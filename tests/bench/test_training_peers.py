"""Training steps of others; torch and transformers are fakes, but for one test where they are there."""

import dataclasses
import importlib.util
import sys
import types
from typing import ClassVar

import numpy as np
import pytest

from jaxchunk.bench import training, training_peers
from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.training.config import TrainConfig

CONFIG = TrainConfig(data="synthetic", seq_len=16, batch_size=4)


class FakeTensor(float):
    """A number that was somewhere on a device."""

    def backward(self):
        FakeTorch.events.append(("backward", float(self)))

    def detach(self):
        return self

    def __mul__(self, other):
        return FakeTensor(float(self) * other)


class FakeIds:
    def __init__(self, array):
        self.array = array

    def to(self, device, non_blocking):
        return self

    def long(self):
        return self

    def split(self, size):
        return [self.array[i : i + size] for i in range(0, len(self.array), size)]


class FakeModel:
    """Runs out of memory above `most` sequences."""

    most = 4

    def __init__(self, config):
        self.config, self.dtype = config, "torch.float32"

    def to(self, dtype):
        self.dtype = dtype
        return self

    def train(self):
        return self

    def parameters(self):
        return iter([types.SimpleNamespace(device=types.SimpleNamespace(type="cpu"), dtype=self.dtype)])

    def zero_grad(self, set_to_none):
        FakeTorch.events.append("zero")

    def __call__(self, *, input_ids, labels, shift_labels, use_cache):
        if len(input_ids) > self.most:
            raise FakeTorch.OutOfMemoryError
        assert labels is shift_labels and not use_cache
        return types.SimpleNamespace(loss=FakeTensor(len(input_ids)))


class FakeTorch(types.ModuleType):
    events: ClassVar[list] = []
    float32, bfloat16 = "torch.float32", "torch.bfloat16"

    class OutOfMemoryError(Exception):
        pass

    class Autocast:
        def __init__(self, device, dtype):
            FakeTorch.events.append(("autocast", dtype))

        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    class AdamW:
        def __init__(self, parameters, **options):
            self.options = options

        def zero_grad(self, set_to_none):
            pass

        def step(self):
            FakeTorch.events.append("step")

    class Device(str):
        def __enter__(self):
            pass

        def __exit__(self, *error):
            pass

    def __init__(self):
        super().__init__("torch")
        self.cuda = types.SimpleNamespace(is_available=lambda: False, empty_cache=lambda: None)
        self.optim = types.SimpleNamespace(AdamW=self.AdamW)
        clip = types.SimpleNamespace(clip_grad_norm_=lambda parameters, norm: self.events.append(("clip", norm)))
        self.nn = types.SimpleNamespace(utils=clip)
        self.device, self.autocast, self.from_numpy = self.Device, self.Autocast, FakeIds
        self.manual_seed, self.zeros = (lambda seed: None), (lambda shape, device: FakeTensor(0.0))
        self.compile = lambda model: model


@pytest.fixture
def fakes(monkeypatch):
    FakeTorch.events.clear()
    patched = FakeTorch.events.append
    transformers = types.ModuleType("transformers")
    transformers.Qwen2Config, transformers.Qwen2ForCausalLM = dict, FakeModel
    liger = types.ModuleType("liger_kernel.transformers")
    liger.apply_liger_kernel_to_qwen2 = lambda: patched("liger")
    modules = {"torch": FakeTorch(), "transformers": transformers, "liger_kernel.transformers": liger}
    modules["liger_kernel"] = types.ModuleType("liger_kernel")
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    version = lambda name: {"torch": "2.0", "transformers": "5.1", "liger-kernel": "0.8"}[name]  # noqa: E731
    monkeypatch.setattr(training_peers.importlib.metadata, "version", version)
    monkeypatch.setitem(qwen2.SIZES, "tiny", qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True))
    return FakeTorch.events


def test_micro_batches_are_halved_until_they_fit(fakes, monkeypatch, caplog):
    monkeypatch.setattr(FakeModel, "most", 2)
    variant = training_peers.variant("liger_autocast", CONFIG)
    assert variant.name == "transformers 5.1 + Liger 0.8, float32 weights"
    expected = {"peer": "liger_autocast", "micro_batch_size": 2, "memory_bytes": None, "weights": "float32"}
    assert variant.factors == expected
    assert "micro-batches of 4 do not fit" in caplog.text and fakes[0] == "liger"
    fakes.clear()
    # Each half's mean loss counts half; both gradients come before the one clip and the one step.
    assert float(variant.call().loss) == pytest.approx(2.0)
    cast = ("autocast", "torch.bfloat16")
    assert fakes == [cast, ("backward", 1.0), cast, ("backward", 1.0), ("clip", CONFIG.grad_clip), "step"]


def test_bfloat16_throughout_needs_no_autocast(fakes):
    variant = training_peers.variant("transformers", CONFIG)
    assert (variant.name, variant.factors["weights"]) == ("transformers 5.1, bfloat16 weights", "bfloat16")
    assert not any(event == "liger" or event[0] == "autocast" for event in fakes)


def test_names_are_checked_before_anything_starts(monkeypatch, caplog):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "liger_kernel" else name)
    assert training_peers.choose(("torch_compile",)) == ["torch_compile"]
    assert training_peers.choose(("all",)) == ["transformers", "transformers_autocast", "torch_compile"]
    assert "liger is left out: liger-kernel not installed" in caplog.messages
    for names, words in (
        (("liger",), "--peers: liger needs liger-kernel; install what is missing, or leave it out"),
        (("apex",), "--peers has apex; choose from all, liger,"),
        (("all", "liger"), "give all alone"),
    ):
        with pytest.raises(InputError, match=words):
            training.run(training.TrainingBenchConfig(peers=names), {})


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="torch and transformers are not installed"
)
def test_transformers_itself(monkeypatch):
    """The loss is that of the labels we give, not of shifted ones, and steps lower it."""
    import torch

    monkeypatch.setitem(qwen2.SIZES, "tiny", qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True))
    batch = {"tokens": np.arange(64, dtype=np.int32).reshape(4, 16), "labels": np.full((4, 16), 7, np.int32)}
    monkeypatch.setattr(training_peers, "_batches", lambda config: iter(lambda: batch, None))
    config = dataclasses.replace(CONFIG, lr=1e-1)
    variant = training_peers.variant("transformers_autocast", config)
    model = variant.call._model
    with torch.no_grad():
        logits = model(torch.from_numpy(batch["tokens"]).long()).logits
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.full((64,), 7))
    losses = [float(variant.call().loss) for _ in range(5)]
    assert losses[0] == pytest.approx(float(expected), rel=1e-2) and losses[-1] < losses[0] - 0.1
