"""Bad flags are named before anything starts."""

import dataclasses

import pytest

from jaxchunk.errors import InputError
from jaxchunk.training.config import TrainConfig, default_config, validate


def test_the_defaults_are_valid_on_a_cpu():
    validate(default_config("cpu"))
    assert default_config("cpu").model == "tiny"
    gpu = default_config("gpu")
    assert (gpu.model, gpu.seq_len, gpu.batch_size, gpu.compute_dtype) == ("qwen2-0.5b", 1024, 64, "bfloat16")
    assert gpu.tokens_per_step == 65536


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lmhead_chunks": 0}, "--lmhead_chunks is 0; it must be at least 1"),
        ({"seq_len": 0}, "--seq_len is 0"),
        ({"batch_size": -1}, "--batch_size is -1"),
        ({"steps": 0}, "--steps is 0"),
        ({"lr": 0.0}, "--lr is 0.0; it must be greater than 0"),
        ({"lr": float("nan")}, "--lr is nan; it must be a finite number"),
        ({"weight_decay": float("inf")}, "--weight_decay is inf"),
        ({"seed": -1}, "--seed is -1; it must be between 0 and"),
        ({"seed": 10**23}, "--seed is 1000"),
        ({"beta2": 1.0}, "--beta2 is 1.0; it must be between 0 and 1"),
        ({"val_fraction": 0.0}, "--val_fraction is 0.0"),
        ({"val_every": -1}, "--val_every is -1; it must not be negative"),
        ({"final_lr_ratio": 2.0}, "--final_lr_ratio is 2.0"),
        ({"warmup_steps": 501}, r"--warmup_steps is 501; it must be between 0 and --steps \(500\)"),
        ({"micro_batch_size": 3}, r"--micro_batch_size is 3; it must divide --batch_size \(8\)"),
        ({"profile_steps": "10"}, "--profile_steps is 10; write the first and the last step, 10:15"),
        ({"profile_steps": "5:3"}, "--profile_steps is 5:3; write the first"),
        ({"profile_steps": "0:3"}, "--profile_steps is 0:3; write the first"),
        ({"profile_steps": "499:501"}, "--profile_steps is 499:501; --steps ends at 500"),
        ({"lmhead_impl": "cuda"}, "--lmhead_impl: implementation is 'cuda'"),
        ({"lmhead_impl": "pallas"}, "--lmhead_impl: implementation='pallas' cannot run: it needs an NVIDIA GPU"),
    ],
)
def test_bad_values_are_named(change, words, monkeypatch):
    monkeypatch.setattr("jaxchunk.lm_head.dispatch.default_platform", lambda: "cpu")
    with pytest.raises(InputError, match=words) as caught:
        validate(dataclasses.replace(TrainConfig(), **change))
    assert "\n" not in str(caught.value)
