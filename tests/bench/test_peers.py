"""LM heads of others in the LM-head benchmark; torch and the peers are fakes, but for one test where torch is there."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
import threading
import time
import types

import fake_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.bench import lm_head, peers
from jaxchunk.errors import InputError
from jaxchunk.telemetry import CompletionWatcher

CONFIG = lm_head.LMHeadBenchConfig(
    tokens=64, width=16, vocab=97, chunks=(2,), peers=("all",), repeats=3, window_s=0.01, settle_s=0.0
)


def module(name, **contents):
    made = types.ModuleType(name)
    made.__dict__.update(contents)
    return made


@pytest.fixture
def install(monkeypatch):
    """Puts modules in the place of packages; those of peers that are not given cannot be imported."""
    for name in ("torch", "liger_kernel", "cut_cross_entropy", "quack"):
        monkeypatch.setitem(sys.modules, name, None)
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3" if name in DISTRIBUTIONS else version(name))

    def put(**modules):
        for name, made in modules.items():
            monkeypatch.setitem(sys.modules, name.replace("__", "."), made)

    return put


DISTRIBUTIONS = {peer.distribution for peer in peers.PEERS.values()}
LIGER = "liger_kernel__transformers__functional"


def liger(loss=fake_torch.cross_entropy):
    functional = module("functional", liger_fused_linear_cross_entropy=loss)
    return {"liger_kernel": module("liger_kernel"), "liger_kernel__transformers": module("x"), LIGER: functional}


def loaded(config=CONFIG):
    return [program for program in lm_head.compile_variants(config, limit_bytes=None) if program.is_peer]


def test_what_is_not_installed_is_left_out_of_all_and_ours_have_errors(install, caplog):
    programs = list(lm_head.compile_variants(CONFIG, limit_bytes=None))
    assert [p.variant.name for p in programs] == ["GEMM floor", "autodiff", "xla, 2 chunks"]
    assert [p.accuracy is None for p in programs] == [True, False, False]
    assert programs[2].accuracy.errors["random"]["d_hidden"] < 1e-5
    left_out = [line for line in caplog.messages if "is left out" in line]
    assert [line.split()[0] for line in left_out] == list(peers.PEERS)
    assert left_out[0].startswith("liger is left out: liger-kernel cannot be imported (ModuleNotFoundError: ")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("all", "liger"), "--peers is all liger; give all alone, or names"),
        (("apex",), "--peers is apex; choose from all, liger, cce, quack, torch_compile, torch_eager"),
        (("quack",), "--peers: quack-kernels cannot be imported .*; install it, or leave quack out"),
    ],
)
def test_bad_names_are_refused(install, names, words):
    with pytest.raises(InputError, match=words):
        lm_head.validate(dataclasses.replace(CONFIG, peers=names))


def test_a_peer_sees_our_memory_and_its_errors_are_measured(install):
    seen = []

    def loss(hidden, weight, labels, accum_dtype):
        assert accum_dtype == np.float32
        seen.append((hidden.array, weight.array))
        return fake_torch.cross_entropy(hidden, weight, labels, d_hidden_scale=1.1)

    install(torch=fake_torch.make(), **liger(loss))
    lm_head.validate(dataclasses.replace(CONFIG, peers=("liger",)))
    (program,) = loaded()
    assert (program.variant.name, program.temporary_bytes) == ("Liger 1.2.3", None)
    for errors in program.accuracy.errors.values():
        assert errors["d_hidden"] == pytest.approx(0.1, rel=1e-3)
        assert max(errors["loss"], errors["d_weight"]) < 1e-6
    assert [hidden.shape[0] for hidden, _ in seen] == [64, 64, 64]  # full size, then both slices
    assert np.shares_memory(seen[0][0], seen[1][0]) and np.shares_memory(seen[0][1], seen[2][1])


def test_the_weight_is_cast_for_those_who_take_no_float32_one(install):
    given = []

    def loss(hidden, weight, labels, **options):
        given.append((str(hidden.dtype), str(weight.dtype), options.get("chunk_size")))
        return fake_torch.cross_entropy(hidden, weight, labels)

    torch = fake_torch.make()
    quack = module("linear_cross_entropy", chunked_linear_cross_entropy=loss)
    install(torch=torch, **liger(loss), quack=module("quack"), quack__linear_cross_entropy=quack)
    programs = loaded(dataclasses.replace(CONFIG, dtype="bfloat16"))
    assert [program.variant.name for program in programs] == ["Liger 1.2.3", "QuACK 1.2.3"]
    assert given == 3 * [("bfloat16", "bfloat16", None)] + 3 * [("bfloat16", "float32", 8192)]
    assert torch.autocasts == 3 * [True]  # which casts the master


def test_a_peer_that_fails_is_left_out_and_the_others_run(install, caplog):
    def fails(*_, **__):
        raise RuntimeError("out of memory\nand a long story")

    functional = module(
        "functional", linear=lambda x, W: (x, W), cross_entropy=lambda z, y: fake_torch.cross_entropy(*z, y)
    )
    torch = fake_torch.make()
    torch.compile = lambda function, dynamic: fails
    install(torch=torch, torch__nn=module("nn", functional=functional), **liger(fails))
    assert [program.variant.name for program in loaded()] == ["torch eager 1.2.3"]
    assert "liger is left out: its first call failed (RuntimeError: out of memory)" in caplog.messages
    assert "torch_compile is left out: its first call failed (RuntimeError: out of memory)" in caplog.messages


def test_memory_is_the_peak_of_a_call_without_operands_and_results(install):
    fake_torch.Event.finished.set()
    results = 4 * (1 + 64 * 16 + 97 * 16)
    torch = fake_torch.make(is_cuda=True, peak=results + 12345)
    install(torch=torch, **liger())
    (program,) = loaded()
    assert program.temporary_bytes == 12345
    assert torch.cuda.share == pytest.approx(0.47)  # JAX has 0.5


def test_results_are_waited_for_in_every_thread():
    fake_torch.Event.finished.clear()
    result = peers.Pending(fake_torch.Tensor(np.zeros(3, np.float32)), fake_torch.Event(blocking=True))
    assert jax.tree.leaves((result, result)) == [result, result] and result.nbytes == 12
    watcher = CompletionWatcher()
    watcher.watch(0, result)
    waiting = [threading.Thread(target=jax.block_until_ready, args=([result],)) for _ in range(2)]
    for thread in waiting:
        thread.start()
    time.sleep(0.05)
    assert not watcher.done(0) and all(thread.is_alive() for thread in waiting)
    finished_s = time.perf_counter()
    fake_torch.Event.finished.set()
    assert watcher.wait(0) >= finished_s
    for thread in waiting:
        thread.join(10)
    assert not any(thread.is_alive() for thread in waiting)
    watcher.close()
    np.testing.assert_array_equal(result.to_jax(), np.zeros(3))


def test_peers_are_measured_among_ours(install, tmp_path, capsys):
    install(torch=fake_torch.make(), **liger())
    path = tmp_path / "run"
    lm_head.run(dataclasses.replace(CONFIG, out_dir=str(path)))
    records = [json.loads(line) for line in (path / "records.jsonl").read_text().splitlines()]
    names = ["GEMM floor", "autodiff", "xla, 2 chunks", "Liger 1.2.3"]
    orders = [tuple(r["variant"] for r in records if r["repeat"] == repeat) for repeat in range(3)]
    assert all(sorted(order) == sorted(names) for order in orders) and len(set(orders)) > 1
    rows = json.loads((path / "summary.json").read_text())
    assert [row["variant"] for row in rows] == names and [row["is_peer"] for row in rows] == [False] * 3 + [True]
    assert rows[3]["time_over_floor"]["median"] > 0 and rows[3]["errors"]["confident"]["d_weight"] < 1e-6
    assert (path / "lm_head.png").read_bytes().startswith(b"\x89PNG")
    header, _, *lines = (path / "table.md").read_text().splitlines()
    assert header.endswith("| temporaries, GB | dW is | errors of loss, dX, dW | with confident labels |")
    assert "| null | float32 | " in lines[3] and "| - | - | - |" in lines[0]
    assert "every call casts the float32 weight to float32" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_itself():
    config = dataclasses.replace(CONFIG, peers=("torch_eager",), dtype="bfloat16")
    *_, ours, eager = lm_head.compile_variants(config, limit_bytes=None)
    assert eager.variant.name == f"torch eager {importlib.metadata.version('torch')}"
    assert eager.accuracy.d_weight_dtype == "bfloat16" and ours.accuracy.d_weight_dtype == "float32"
    for errors in eager.accuracy.errors.values():
        assert 1e-4 < errors["d_hidden"] < 5e-3 and 1e-4 < errors["d_weight"] < 5e-3
    loss, (d_hidden, d_weight) = jax.block_until_ready(eager.variant.call())
    expected, _ = ours.variant.call()
    assert float(loss.to_jax()) == pytest.approx(float(expected), rel=1e-2)
    assert (d_hidden.to_jax().shape, d_weight.to_jax().shape) == ((64, 16), (97, 16))
    hidden = jax.block_until_ready(jnp.ones((64, 16), jnp.bfloat16))
    tensors = peers.to_torch(hidden, jnp.ones((97, 16)), jnp.zeros(64, int))
    assert tensors[0].data_ptr() == hidden.unsafe_buffer_pointer()
