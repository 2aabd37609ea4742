"""Saving and restoring one state: exactly, on other devices, with damage named and a full disk survived."""

import dataclasses
import os
import resource
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.training import checkpoint
from jaxchunk.training.checkpoint import Checkpoints, Unreadable, load_params, restore, saved_steps
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.step import TrainState

# Where Orbax meets an error, coroutines stay that it never awaits: they are not ours to close.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.usefixtures("no_coroutine_outlives_the_module"),
]

ABOUT = {"config": {}, "batches": {"next_index": 7}}


def state(step, size=64):
    params = {"embedding": jax.random.normal(jax.random.key(step), (size, 8)), "norm": jnp.ones(3)}
    moments = jax.tree.map(lambda a: a * 0.1, params)
    return TrainState(params, ((), {"count": jnp.int32(step), "mu": moments}), jnp.int32(step))


def like(step=0, sharding=None, **sizes):
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), state(step, **sizes))


def save(path, losses, keep=2, said=None):
    """Saves one checkpoint for each of `losses`, at steps 1, 2, ..."""
    with Checkpoints(path, keep=keep, say=[].append if said is None else said.append) as checkpoints:
        for step, loss in enumerate(losses, 1):
            checkpoints.save(step, state(step), ABOUT, loss)
    return checkpoints


def assert_same(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_is_restored_is_what_was_saved(tmp_path):
    save(tmp_path, [None])
    restored = restore(tmp_path, 1, like())
    assert_same(restored.state, state(1))
    assert restored.about == {"format": 1} | ABOUT
    assert [a.sharding for a in jax.tree.leaves(restored.state)] == [a.sharding for a in jax.tree.leaves(like())]


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda a: a * 0 - 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        large = state(1, size=100_000)
        checkpoints.save(1, large, ABOUT, None)
        for _ in range(3):
            large = step(large)
        jax.block_until_ready(large)
    assert_same(restore(tmp_path, 1, like(size=100_000)).state, state(1, size=100_000))


def test_the_latest_and_the_best_are_kept(tmp_path):
    save(tmp_path, [3.0, 1.0, 2.0, None, 4.0, None])
    assert saved_steps(tmp_path) == [6, 5, 2]


def test_a_reopened_directory_remembers_the_best(tmp_path):
    save(tmp_path, [1.0, 2.0])
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        assert checkpoints.newest == 2
        for step in (3, 4):
            checkpoints.save(step, state(step), ABOUT, 3.0)
    assert saved_steps(tmp_path) == [4, 1]


@pytest.mark.parametrize("back", [False, True])
def test_other_devices_get_the_same_state(tmp_path, back):
    """Saved on one device and restored over four, and the other way round."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows = like()
    rows = jax.tree.map(
        lambda a: a.update(
            sharding=NamedSharding(mesh, PartitionSpec("data") if a.shape == (64, 8) else PartitionSpec())
        ),
        rows,
    )
    saved = jax.tree.map(lambda a, shape: jax.device_put(a, shape.sharding), state(1), rows) if back else state(1)
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        checkpoints.save(1, saved, ABOUT, None)
    target = like() if back else rows
    restored = restore(tmp_path, 1, target).state
    assert_same(restored, state(1))
    assert len(restored.params["embedding"].sharding.device_set) == (1 if back else 4)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, target)


def cut_in_half(path):
    largest = max(
        (file for file in (path / "params").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
    )
    os.truncate(largest, largest.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_in_half, "OUT_OF_RANGE|DATA_LOSS|FAILED_PRECONDITION"),
        (lambda path: shutil.rmtree(path / "optimizer"), 'Item "optimizer" was not found'),
        (lambda path: (path / "params" / "manifest.ocdbt").unlink(), "NOT_FOUND"),
        (lambda path: (path / "run" / "metadata").write_text('{"form'), "Unterminated string"),
        (lambda path: (path / "run" / "metadata").write_text('{"format": 2}'), "format 2, and this jaxchunk reads"),
    ],
)
def test_damage_is_named(tmp_path, damage, words):
    save(tmp_path, [1.0])
    damage(tmp_path / "checkpoints" / "1")
    with pytest.raises(Unreadable, match=words) as caught:
        restore(tmp_path, 1, like())
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_another_shape_or_optimizer_is_no_such_checkpoint(tmp_path):
    save(tmp_path, [None])
    with pytest.raises(Unreadable, match=r"Requested shape: \(32, 8\)"):
        restore(tmp_path, 1, like(size=32))
    with pytest.raises(Unreadable, match="tree structures do not match"):
        restore(tmp_path, 1, like()._replace(opt_state={}))


def test_a_damaged_validation_loss_costs_no_more_than_itself(tmp_path, caplog):
    save(tmp_path, [1.0, 2.0, 3.0])
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text('{"val')
    assert_same(restore(tmp_path, 3, like()).state, state(3))
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        checkpoints.save(4, state(4), ABOUT, 4.0)
    assert "the validation loss of checkpoint 1 cannot be read" in caplog.text
    assert saved_steps(tmp_path) == [4, 2]


def test_too_little_memory_is_no_damage(tmp_path, monkeypatch):
    save(tmp_path, [None])

    def exhausted(*arguments, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "restore", exhausted)
    with pytest.raises(jax.errors.JaxRuntimeError):
        restore(tmp_path, 1, like())


def test_what_an_unfinished_save_left_is_ignored_and_cleared_away(tmp_path):
    save(tmp_path, [None])
    unfinished = tmp_path / "checkpoints" / f"2{ocp.utils.TMP_DIR_SUFFIX}"
    shutil.copytree(tmp_path / "checkpoints" / "1", unfinished)
    assert saved_steps(tmp_path) == [1]
    assert unfinished.exists()  # reading changes nothing: it may be being written
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        assert not unfinished.exists()
        checkpoints.save(2, state(2), ABOUT, None)
    assert saved_steps(tmp_path) == [2]


def test_a_full_disk_is_told_and_leaves_the_last_good_one(tmp_path):
    """The operating system refuses files larger than a few kB: TensorStore, which is not Python, meets it too."""
    said = []
    with Checkpoints(tmp_path, keep=1, say=said.append) as checkpoints:
        checkpoints.save(1, state(1, size=100_000), ABOUT, None)
        checkpoints.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        try:
            checkpoints.save(2, state(2, size=100_000), ABOUT, None)
            while not said:
                checkpoints.poll()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert said == ["the checkpoint of step 2 could not be written: File too large; that of step 1 stays"]
        assert checkpoints.newest == 1
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]  # the room is free again
        assert_same(restore(tmp_path, 1, like(size=100_000)).state, state(1, size=100_000))
        checkpoints.save(3, state(3, size=100_000), ABOUT, None)
    assert saved_steps(tmp_path) == [3] and len(said) == 1


def test_a_disk_without_room_is_not_filled(tmp_path, monkeypatch):
    said = []
    with Checkpoints(tmp_path, keep=1, say=said.append) as checkpoints:
        checkpoints.save(1, state(1), ABOUT, None)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(total=10**9, free=4000))
        checkpoints.save(2, state(2), ABOUT, None)
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(total=0, free=0))
        checkpoints.save(3, state(3), ABOUT, None)
    assert said == [
        "the checkpoint of step 2 could not be written: it needs 4.13e-06 GB, and 4e-06 are free; that of step 1 stays"
    ]
    assert saved_steps(tmp_path) == [3]


def test_no_space_for_the_first_directory(tmp_path, monkeypatch):
    """ENOSPC where Python meets it: as directories are made."""
    said, make = [], os.mkdir

    def full(path, *arguments, **options):
        if "checkpoints/" in str(path):
            raise OSError(28, "No space left on device")
        return make(path, *arguments, **options)

    with Checkpoints(tmp_path, keep=1, say=said.append) as checkpoints:
        monkeypatch.setattr(os, "mkdir", full)
        checkpoints.save(1, state(1), ABOUT, None)
        checkpoints.wait()
        assert said == [
            "the checkpoint of step 1 could not be written: No space left on device; there is none before it"
        ]
        assert checkpoints.newest is None
        monkeypatch.undo()
        checkpoints.save(2, state(2), ABOUT, None)
    assert saved_steps(tmp_path) == [2]


def test_parameters_of_a_run_for_other_programs(tmp_path):
    model = qwen2.Qwen2Config(97, 32, 2, 4, 2, 48, tie_word_embeddings=True)
    config = TrainConfig(seed=5)
    flags = dataclasses.asdict(config) | {"of_a_later_version": 1}
    about = {"step": 1, "config": flags, "model": hf.to_hf_config(model, "float32")}

    def params(value):
        return jax.tree.map(
            lambda shape: jnp.asarray(np.full(shape.shape, value, shape.dtype)), qwen2.param_shapes(model)
        )

    with pytest.raises(InputError, match="holds no checkpoint"):
        load_params(tmp_path)
    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        for step, loss in ((1, 1.0), (2, 2.0)):
            checkpoints.save(step, TrainState(params(step), (), jnp.int32(step)), about, loss)
    latest, best = load_params(tmp_path), load_params(tmp_path, best=True)
    assert (latest.step, best.step) == (2, 1)
    assert latest.config == config and latest.model == model
    assert_same(latest.params, params(2))
    assert_same(best.params, params(1))


def test_without_a_validation_there_is_no_best(tmp_path):
    save(tmp_path, [None])
    with pytest.raises(InputError, match="has a validation loss: take the latest"):
        load_params(tmp_path, best=True)
