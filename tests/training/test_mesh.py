"""Training over meshes of simulated devices: the numbers of one, no collective too many, and what does not fit."""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk.data import IGNORE_INDEX
from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.models.partition import AXES, batch_spec
from jaxchunk.run_dir import read_json_lines
from jaxchunk.training import loop, trainer
from jaxchunk.training.checkpoint import Checkpoints, restore
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.memory import estimate_bytes
from jaxchunk.training.mesh import Shards, check_model_fits, choose_devices, param_specs, state_shardings
from jaxchunk.training.step import init_state, make_gradients, make_optimizer, make_train_step

MODEL = qwen2.Qwen2Config(112, 32, 2, 4, 2, 48, tie_word_embeddings=True)
CONFIG = TrainConfig(seq_len=16, batch_size=8, steps=20, lmhead_chunks=2)


def devices(data, fsdp, model, config=CONFIG):
    config = dataclasses.replace(config, mesh_data=data, mesh_fsdp=fsdp, mesh_model=model)
    return choose_devices(config, jax.devices("cpu"))


def batch():
    """Devices and micro-batches differ in how many tokens count."""
    tokens = np.random.default_rng(0).integers(0, 112, (8, 17)).astype(np.int32)
    labels = tokens[:, 1:].copy()
    labels[:3, 2:] = IGNORE_INDEX
    return {"tokens": tokens[:, :-1].copy(), "labels": labels}


def execution(mesh, **options):
    return qwen2.Execution(compute_dtype=jnp.float32, sharded=mesh is not None, **options)


def two_steps(shape, micro_batch_size, **options):
    on = devices(*shape)
    optimizer = make_optimizer(CONFIG)
    step = jax.jit(make_train_step(CONFIG, MODEL, execution(on.mesh, **options), optimizer, micro_batch_size, on.mesh))
    state, data = init_state(optimizer, qwen2.init(MODEL, jax.random.key(0))), batch()
    if on.mesh is not None:
        state = jax.device_put(state, state_shardings(on.mesh, state))
        data = on.place_batch(data, CONFIG.batch_size)
    first = None
    for _ in range(2):
        state, metrics = step(state, data)
        first = first or metrics
    return jax.device_get((first, metrics, state.params))


@pytest.fixture(scope="module")
def on_one_device():
    return two_steps((1, 1, 1), 8)


@pytest.mark.parametrize(
    ("shape", "micro_batch_size", "options"),
    [
        ((2, 2, 2), 4, {"scan_layers": True}),
        ((1, 4, 1), 8, {"mlp_chunks": 3}),
        ((2, 1, 2), 4, {"remat": "full", "scan_layers": True}),
    ],
    ids=str,
)
def test_a_mesh_gives_the_numbers_of_one_device(on_one_device, shape, micro_batch_size, options):
    found = two_steps(shape, micro_batch_size, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-6), found, on_one_device)


def collectives(shape, micro_batch_size):
    """Collectives of the gradients' program: in the entry computation, and elsewhere, that is in loops."""
    on = devices(*shape)
    params = jax.tree.map(
        lambda a, spec: a.update(sharding=NamedSharding(on.mesh, spec)),
        qwen2.param_shapes(MODEL),
        param_specs(on.mesh, qwen2.param_shapes(MODEL)),
    )
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=NamedSharding(on.mesh, batch_spec(on.mesh)))
    gradients = make_gradients(CONFIG, MODEL, execution(on.mesh, scan_layers=True), micro_batch_size, on.mesh)
    text = jax.jit(gradients).lower(params, {"tokens": ids, "labels": ids}).compile().as_text()
    cut = text.index("\nENTRY")
    find = lambda part: re.findall(  # noqa: E731
        r"= \(?(\w+\[[\d,]*\]).* (all-gather|all-reduce|reduce-scatter)(?:-start)?\(", part
    )
    return find(text[cut:]), find(text[:cut])


def test_data_parallel_gradients_are_summed_once_after_all_micro_batches():
    in_entry, in_loops = collectives((4, 1, 1), 4)
    assert [kind for _, kind in in_entry] == ["all-reduce"] * 2  # how many tokens count; all gradients
    assert in_loops == [("f32[]", "all-reduce")]  # each micro-batch's loss


def test_fsdp_gathers_the_vocabulary_before_the_chunks_and_blocks_where_they_are_used():
    in_entry, in_loops = collectives((1, 4, 1), 8)
    assert [shape for shape, kind in in_entry if kind == "all-gather"] == ["f32[112,32]"]  # once, though it is tied
    assert "f32[112,8]" in [shape for shape, kind in in_entry if kind == "reduce-scatter"]
    gathered = {shape for shape, kind in in_loops if kind == "all-gather"}
    assert gathered == {"f32[32,32]", "f32[32,16]", "f32[32,48]", "f32[48,32]"}  # one block's matrices, over blocks


def test_attention_is_each_devices_own_on_a_gpu(monkeypatch):
    """Lowered for CUDA: cuDNN gets the sequences and heads of one device."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    model = dataclasses.replace(MODEL, hidden_size=256, intermediate_size=64, vocab_size=128)
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    mesh = AbstractMesh((2, 1, 2), AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    run = qwen2.Execution(jnp.bfloat16, "cudnn", scan_layers=True, sharded=True)
    config = dataclasses.replace(CONFIG, lmhead_impl="xla")
    ids = jax.ShapeDtypeStruct((8, 64), jnp.int32)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(make_gradients(config, model, run, 8, mesh)).trace(
            qwen2.param_shapes(model), {"tokens": ids, "labels": ids}
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert len(calls) == 2  # forward and backward
    assert all("tensor<4x64x2x64xbf16>" in line for line in calls)  # 8 / 2 sequences, 4 / 2 heads


def test_every_matrix_is_sharded_over_fsdp_and_its_moments_with_it():
    on = devices(1, 2, 2)
    optimizer = make_optimizer(CONFIG)
    shapes = jax.eval_shape(lambda: init_state(optimizer, qwen2.init(MODEL, jax.random.key(0))))
    shardings = state_shardings(on.mesh, shapes)
    for path, sharding in jax.tree.leaves_with_path(shardings.params):
        assert ("fsdp" in sharding.spec) == (not path[-1].key.endswith(("norm", "bias"))), path
    is_adam = lambda node: hasattr(node, "mu")  # noqa: E731
    moments = [node.mu for node in jax.tree.leaves(shardings.opt_state, is_leaf=is_adam) if is_adam(node)]
    assert moments == [shardings.params]
    assert shardings.params["embedding"].spec == P("model", "fsdp")


@pytest.mark.parametrize(
    ("before", "after"), [((8, 1, 1), (1, 1, 1)), ((1, 1, 1), (8, 1, 1)), ((1, 4, 1), (1, 2, 2))], ids=str
)
def test_a_checkpoint_is_restored_on_another_mesh(tmp_path, before, after):
    optimizer = make_optimizer(CONFIG)
    state = init_state(optimizer, qwen2.init(MODEL, jax.random.key(3)))

    def shardings(shape):
        on = devices(*shape)
        one = jax.sharding.SingleDeviceSharding(on.used[0])
        return jax.tree.map(lambda _: one, state) if on.mesh is None else state_shardings(on.mesh, state)

    with Checkpoints(tmp_path, keep=1, say=print) as checkpoints:
        checkpoints.save(1, jax.device_put(state, shardings(before)), {"batches": {}}, None)
    like = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings(after))
    restored = restore(tmp_path, 1, like).state
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    assert jax.tree.map(lambda a: a.sharding, restored) == shardings(after)


def test_a_run_goes_on_on_another_mesh_and_says_so(config, monkeypatch, capsys):
    config = dataclasses.replace(config, checkpoint_every=4, val_every=0, lmhead_chunks=1, micro_batch_size=None)
    whole = dataclasses.replace(config, out_dir=f"{config.out_dir}-whole", keep_checkpoints=0)
    trainer.train(whole)
    with monkeypatch.context() as patched:
        patched.setattr(loop, "_stretches", lambda *_: [(1, 4)])  # as if it had been killed
        trainer.train(config)
    capsys.readouterr()
    summary = trainer.train(dataclasses.replace(config, mesh_data=1, mesh_fsdp=2, mesh_model=2, resume=True))
    assert (summary["status"], summary["steps"]) == ("completed", 12)
    out = capsys.readouterr().out
    assert "4 of 8, mesh 1 data x 2 fsdp x 2 model" in out
    assert "resumed after step 4, which was saved on 1 data x 1 fsdp x 1 model: equal but not to the bit" in out
    assert "GB on each device" in out and "tokens in each micro-batch of each device" in out
    losses = [[record["loss"] for record in read_json_lines(Path(c.out_dir) / "steps.jsonl")] for c in (config, whole)]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"mesh_fsdp": 3}, "--mesh_fsdp 3 x --mesh_model 1 are 3 devices, which do not divide the 8 that JAX finds"),
        (
            {"mesh_data": 8, "mesh_model": 2},
            "--mesh_data 8 x --mesh_fsdp 1 x --mesh_model 2 are 16 devices; JAX finds 8",
        ),
        ({"batch_size": 12}, r"--batch_size is 12; 8 x 1 devices .* multiple of 8, or --mesh_data 1"),
        ({"batch_size": 16, "micro_batch_size": 4}, "--micro_batch_size is 4, of all devices .* a multiple of 8"),
        ({"mesh_model": 4}, "--mesh_model is 4; --model tiny has 2 key/value heads, .* use 1 or 2"),
        ({"mesh_model": 2, "vocab_size": 97}, "--mesh_model is 2; --model tiny has a vocabulary of 97, .* use 1$"),
        (
            {"mesh_fsdp": 8, "hidden_size": 36, "num_attention_heads": 6},
            "--mesh_fsdp is 8; --model tiny has a width of",
        ),
        ({"lora_rank": 4}, "--lora_rank is 4, which needs one device alone; .* are 8: --mesh_data 1"),
        ({"lmhead_chunks": "auto"}, "--lmhead_chunks auto needs one device alone; .* are 8: a number"),
        ({"sample_every": 10}, "--sample_every is 10, which needs one device alone"),
    ],
)
def test_a_mesh_that_does_not_fit_is_named(flags, words):
    of_model = {name: value for name, value in flags.items() if hasattr(MODEL, name)}
    config = dataclasses.replace(CONFIG, **{name: value for name, value in flags.items() if name not in of_model})

    with pytest.raises(InputError, match=words):
        on = choose_devices(config, jax.devices("cpu"))
        check_model_fits(on, dataclasses.replace(MODEL, **of_model), "--model tiny")


def test_a_device_of_a_mesh_needs_less():
    model, config = qwen2.SIZES["qwen2-0.5b"], dataclasses.replace(CONFIG, batch_size=64, seq_len=1024)
    whole = estimate_bytes(config, model, 64)
    assert estimate_bytes(config, model, 64, Shards(data=2)) < 0.6 * whole
    state = 16 * qwen2.num_params(model)
    for shards in (Shards(fsdp=2), Shards(model=2)):
        assert estimate_bytes(config, model, 64, shards) < whole - state / 2
