"""Checkpoints of Hugging Face: the numbers of transformers (kept in hf_fixtures), round trips, and what is refused."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxchunk import lm_head_loss
from jaxchunk.data.tokenizer import load_tokenizer
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.models.hf.weights import NAMES, tensors_of

FIXTURES = Path(__file__).parent / "hf_fixtures"
CASES = ["qwen2_tied", "qwen2_sharded", "llama3"]
CONFIG = qwen2.Qwen2Config(31, 16, 2, 4, 2, 24, tie_word_embeddings=False)


def random_params(config, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 64))
    shapes = qwen2.param_shapes(config, dtype)
    return jax.tree.map(lambda shape: jax.random.normal(next(keys), shape.shape, shape.dtype), shapes)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def assert_close(actual, expected, rtol=1e-5):
    """Relative to the largest entry."""
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))
    assert error < rtol


def by_hf_name(config, params):
    leaves = {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    values = {}
    for tensor in tensors_of(config):
        leaf = leaves[tensor.parameter]
        value = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
        values[tensor.name] = value.T if tensor.transposed else value
    return values


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_every_gradient_are_those_of_transformers(case):
    config, params = hf.load(FIXTURES / case)
    expected = load_file(FIXTURES / case / "expected.safetensors")
    tokens, labels = jnp.asarray(expected["token_ids"], jnp.int32), jnp.asarray(expected["labels"], jnp.int32)
    assert_close(qwen2.logits(config, params, tokens), expected["logits"])

    def loss(params):
        hidden = qwen2.hidden_states(config, params, tokens, qwen2.Execution(compute_dtype=jnp.float32))
        return lm_head_loss(hidden[:, :-1], qwen2.lm_head_weight(params), labels[:, 1:], num_chunks=3)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(float(expected["loss"]), rel=1e-6)
    gradients = by_hf_name(config, gradients)
    assert {f"gradient/{name}" for name in gradients} == {name for name in expected if name.startswith("gradient/")}
    for name, gradient in gradients.items():
        assert_close(gradient, expected[f"gradient/{name}"])


@pytest.mark.parametrize("case", CASES)
def test_both_places_of_the_config_say_the_same(case):
    new, old = (
        json.loads((FIXTURES / case / name).read_text()) for name in ("config.json", "config_transformers4.json")
    )
    assert "rope_parameters" in new and "rope_theta" not in new and "rope_theta" in old
    assert hf.parse_config(new, "new") == hf.parse_config(old, "old")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_shard_size", [10**9, 6000])
def test_a_round_trip_keeps_every_bit(case, max_shard_size, tmp_path):
    config, params = hf.load(FIXTURES / case)
    hf.save(config, params, tmp_path / "out", max_shard_size=max_shard_size)
    again_config, again = hf.load(tmp_path / "out")
    assert again_config == config
    assert_same_bits(again, params)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert {path.stat().st_mode for path in files} == {(tmp_path / "out" / "config.json").stat().st_mode}
    assert [path.name for path in files] == ["model.safetensors"] if max_shard_size > 6000 else len(files) > 2
    original = {}
    for path in (FIXTURES / case).glob("model*.safetensors"):
        original |= load_file(path)
    written = {}
    for path in files:
        written |= load_file(path)
    assert_same_bits(written, original)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept_unless_named(dtype, tmp_path):
    params = random_params(CONFIG, dtype)
    hf.save(CONFIG, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == jnp.dtype(dtype).name
    _, same = hf.load(tmp_path / "out")
    assert_same_bits(same, params)
    _, wide = hf.load(tmp_path / "out", jnp.float32)
    assert_same_bits(wide, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params))
    hf.save(CONFIG, wide, tmp_path / "narrow", dtype=dtype)
    assert_same_bits(hf.load(tmp_path / "narrow")[1], params)


def test_shards_stay_below_their_size_and_the_index_knows_them(tmp_path):
    hf.save(CONFIG, random_params(CONFIG), tmp_path / "out", max_shard_size=4000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * qwen2.num_params(CONFIG)
    for name in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
            assert {key for key, shard in index["weight_map"].items() if shard == name} == set(file.keys())
            assert sum(file.get_tensor(key).nbytes for key in file.keys()) <= 4000  # noqa: SIM118


def test_the_key_map_names_every_parameter_once():
    for config in (CONFIG, qwen2.Qwen2Config(31, 16, 2, 4, 2, 24, tie_word_embeddings=True, attention_bias=False)):
        names = [tensor.name for tensor in tensors_of(config)]
        assert len(names) == len(set(names))
        elements = sum(int(np.prod(tensor.shape)) for tensor in tensors_of(config))
        assert elements == qwen2.num_params(config)
    assert len(set(NAMES.values())) == len(NAMES)


# What is refused


@pytest.fixture
def checkpoint(tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(FIXTURES / "qwen2_sharded", tmp_path / "checkpoint"))


def rewrite(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def rewrite_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(directory, words):
    with pytest.raises(InputError, match=words) as caught:
        hf.load(directory)
    assert "\n" not in str(caught.value)


def shard_of(directory, tensor):
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    return directory / index["weight_map"][tensor]


def test_a_missing_shard_is_named(checkpoint):
    (checkpoint / "model-00003-of-00005.safetensors").unlink()
    refuse(checkpoint, r"model-00003-of-00005.safetensors is missing: model.safetensors.index.json names it")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_named(checkpoint, keep):
    path = checkpoint / "model-00002-of-00005.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(checkpoint, r"model-00002-of-00005.safetensors \([\d,]+ bytes\) is no whole safetensors file")


def test_an_index_that_disagrees_with_its_files_is_refused(checkpoint):
    rewrite(shard_of(checkpoint, "model.norm.weight"), lambda tensors: tensors.pop("model.norm.weight"))
    refuse(checkpoint, r"safetensors has no tensor model.norm.weight, which model.safetensors.index.json says it has")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {"a": "../other.safetensors"}}'])
def test_a_bad_index_is_refused(checkpoint, content):
    (checkpoint / "model.safetensors.index.json").write_text(content)
    refuse(checkpoint, "model.safetensors.index.json")


def single_file(checkpoint):
    tensors = {}
    for path in checkpoint.glob("model*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (checkpoint / "model.safetensors.index.json").unlink()
    save_file(tensors, checkpoint / "model.safetensors")
    return checkpoint / "model.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.norm.weight"), r"not those of its config.json: 1 missing \(model.norm.weight\)"),
        (lambda t: t.pop("lm_head.weight"), r"1 missing \(lm_head.weight\)"),
        (
            lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t["model.layers.1.mlp.up_proj.weight"]}),
            r"1 unexpected \(model.layers.2.mlp.up_proj.weight\)",
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": np.zeros(16, np.float32)}),
            r"1 unexpected \(model.layers.0.self_attn.o_proj.bias\)",
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"][:52].copy()}),
            r"lm_head.weight is \[52, 16\]; its config.json needs \[53, 16\]",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float64)}),
            "model.norm.weight is stored as F64; only F32, BF16, F16 are read here",
        ),
        (
            lambda t: t.update({"model.norm.weight": t["model.norm.weight"].astype(np.float16)}),
            "holds float16 and float32; say with dtype=",
        ),
        (lambda t: t["model.norm.weight"].__setitem__(3, np.nan), r"model.norm.weight has 1 of 16 values that are NaN"),
        (
            lambda t: t["model.layers.1.mlp.down_proj.weight"].__setitem__(0, np.inf),
            r"model.layers.1.mlp.down_proj.weight has 24 of 384 values that are NaN or infinite",
        ),
    ],
)
def test_wrong_tensors_are_named(checkpoint, change, words):
    path = single_file(checkpoint)
    hf.load(checkpoint)
    rewrite(path, change)
    refuse(checkpoint, words)


def test_bad_values_in_bfloat16_are_seen(tmp_path):
    params = random_params(CONFIG, jnp.bfloat16)
    hf.save(CONFIG, params, tmp_path / "out")
    rewrite(tmp_path / "out" / "model.safetensors", lambda t: t["lm_head.weight"].__setitem__((0, 1), np.nan))
    refuse(tmp_path / "out", "lm_head.weight has 1 of 496 values that are NaN or infinite as bfloat16")


def test_values_that_a_narrower_dtype_does_not_hold_are_seen(tmp_path):
    params = random_params(CONFIG)
    params["final_norm"] = params["final_norm"].at[0].set(1e6)
    with pytest.raises(InputError, match=r"model.norm.weight has 1 of 16 values that are NaN or infinite as float16"):
        hf.save(CONFIG, params, tmp_path / "out", dtype=jnp.float16)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_of_another_config_is_refused(checkpoint):
    rewrite_config(checkpoint, num_hidden_layers=3, layer_types=None)
    refuse(checkpoint, "12 missing")
    rewrite_config(checkpoint, num_hidden_layers=2, intermediate_size=25)
    refuse(checkpoint, r"mlp.gate_proj.weight is \[24, 16\]; its config.json needs \[25, 16\]")


def test_a_stored_head_of_a_tied_model_must_be_the_embedding(checkpoint):
    path = single_file(checkpoint)
    rewrite_config(checkpoint, tie_word_embeddings=True)
    refuse(checkpoint, "tie_word_embeddings is true, but lm_head.weight differs from model.embed_tokens.weight")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}))
    _, params = hf.load(checkpoint)
    assert "lm_head" not in params


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickles_are_refused(checkpoint, name):
    single_file(checkpoint).rename(checkpoint / name)
    refuse(checkpoint, rf"has its weights in {name}, a pickle, which can run code")


def test_a_directory_without_weights_or_config_is_refused(checkpoint):
    single_file(checkpoint).unlink()
    refuse(checkpoint, "holds neither model.safetensors nor model.safetensors.index.json")
    (checkpoint / "config.json").write_text("{")
    refuse(checkpoint, "config.json is damaged")
    (checkpoint / "config.json").unlink()
    refuse(checkpoint, "cannot read .*config.json: No such file or directory; a checkpoint needs it")


def bpe(path, words):
    """A word-level tokenizer.json with these words."""
    vocabulary = {word: number for number, word in enumerate(words)}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": words[0]},
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return path


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint):
    bpe(checkpoint / "tokenizer.json", [f"word{i}" for i in range(53)])
    hf.load(checkpoint)
    bpe(checkpoint / "tokenizer.json", [f"word{i}" for i in range(54)])
    refuse(checkpoint, "has ids up to 53, but the model's vocabulary has 53 entries")
    (checkpoint / "tokenizer.json").write_text("{}")
    refuse(checkpoint, "is not a tokenizer")


# Ids of the Hub


@pytest.mark.parametrize("name", ["/no/such/directory", "no/such/directory", "../x", "a b", ""])
def test_what_is_neither_directory_nor_id_is_refused(name):
    refuse(name, "is no id of a Hugging Face model|holds neither|cannot read")


def test_a_file_is_refused(checkpoint):
    refuse(checkpoint / "config.json", "is a file; give the directory")


def test_an_id_is_looked_up_in_the_cache_and_needs_no_network(tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse("someone/model", "there is no directory someone/model, and Hugging Face's model of that id cannot be had: ")
    folder, commit = tmp_path / "models--someone--model", "0123456789abcdef0123456789abcdef01234567"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    shutil.copytree(FIXTURES / "qwen2_tied", folder / "snapshots" / commit)
    config, params = hf.load("someone/model")
    expected_config, expected = hf.load(FIXTURES / "qwen2_tied")
    assert config == expected_config
    assert_same_bits(params, expected)


# Saving


def test_saving_needs_room_of_its_own_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(InputError, match="full is there already and is no empty directory; choose another"):
        hf.save(CONFIG, random_params(CONFIG), tmp_path / "full")
    (tmp_path / "empty").mkdir()
    hf.save(CONFIG, random_params(CONFIG), tmp_path / "empty")

    def full_disk(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxchunk.models.hf.shards.save_file", full_disk)
    with pytest.raises(InputError, match=r"cannot write .*out: No space left on device; nothing is left of it"):
        hf.save(CONFIG, random_params(CONFIG), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full"]


def test_parameters_of_another_config_are_not_saved(tmp_path):
    params = random_params(CONFIG)
    with pytest.raises(InputError, match=r"parameter lm_head is \[31, 16\]; the config needs \[32, 16\]|embedding"):
        hf.save(qwen2.Qwen2Config(32, 16, 2, 4, 2, 24, tie_word_embeddings=False), params, tmp_path / "out")
    with pytest.raises(InputError, match=r"1 unexpected \(lm_head\)"):
        hf.save(qwen2.Qwen2Config(31, 16, 2, 4, 2, 24, tie_word_embeddings=True), params, tmp_path / "out")
    integers = params | {"final_norm": jnp.ones(16, jnp.int32)}
    with pytest.raises(InputError, match="final_norm is int32; a checkpoint holds float32, bfloat16 or float16"):
        hf.save(CONFIG, integers, tmp_path / "out")
    with pytest.raises(InputError, match="max_shard_size is 0"):
        hf.save(CONFIG, params, tmp_path / "out", max_shard_size=0)
    assert not any(tmp_path.iterdir())


def test_a_bare_tokenizer_gets_what_transformers_needs(tmp_path):
    tokenizer = bpe(tmp_path / "trained-by-us.json", ["<|endoftext|>", "a", "b"])
    (tmp_path / "merges.txt").write_text("of something else")
    hf.save(CONFIG, random_params(CONFIG), tmp_path / "out", tokenizer=tokenizer)
    out = tmp_path / "out"
    assert load_tokenizer(out / "tokenizer.json").get_vocab() == {"<|endoftext|>": 0, "a": 1, "b": 2}
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 0}
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == 0
    assert not (out / "merges.txt").exists()
    assert hf.load(out)[0] == CONFIG


def test_a_tokenizer_of_a_checkpoint_comes_with_its_companions(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = bpe(source / "tokenizer.json", ["<|endoftext|>", "a", "b"])
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 1]}')
    hf.save(CONFIG, random_params(CONFIG), tmp_path / "out", tokenizer=tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 1]
    large = bpe(tmp_path / "large.json", [f"word{i}" for i in range(32)])
    with pytest.raises(InputError, match="has ids up to 31, but the model's vocabulary has 31 entries"):
        hf.save(CONFIG, random_params(CONFIG), tmp_path / "other", tokenizer=large)
