"""The same checks against transformers itself, where it and torch are installed: random configs, and exports."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import data, inference, lm_head_loss
from jaxchunk.data.chat import CHATML, ChatTemplate
from jaxchunk.models import hf, lora, qwen2
from jaxchunk.models.hf.weights import tensors_of
from jaxchunk.models.rope import Llama3Rope

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("default")  # theirs are not ours to fix
LLAMA3 = Llama3Rope(8.0, 1.0, 4.0, 32)
CONFIGS = {
    "tied": qwen2.Qwen2Config(101, 48, 3, 6, 2, 40, tie_word_embeddings=True),
    "multi-head": qwen2.Qwen2Config(64, 32, 1, 4, 4, 72, tie_word_embeddings=False, rope_theta=1e4, rms_norm_eps=1e-5),
    "multi-query": qwen2.Qwen2Config(77, 64, 2, 4, 1, 32, tie_word_embeddings=False),
    "llama": qwen2.Qwen2Config(90, 64, 2, 4, 2, 56, tie_word_embeddings=False, rope_theta=5e5, attention_bias=False),
    "llama 3.2": qwen2.Qwen2Config(
        90, 64, 2, 2, 1, 56, tie_word_embeddings=True, rope_theta=100.0, attention_bias=False, rope_scaling=LLAMA3,
        max_position_embeddings=128,
    ),
}  # fmt: skip


def random_params(config, dtype=jnp.float32):
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def leaf(path, shape):
        center = 1.0 if path[-1].key.endswith("norm") else 0.0
        return (center + 0.2 * jax.random.normal(next(keys), shape.shape)).astype(dtype)

    return jax.tree.map_with_path(leaf, qwen2.param_shapes(config))


def assert_close(actual, expected, rtol=1e-5):
    """Relative to the largest entry."""
    error = np.max(np.abs(np.asarray(actual, np.float64) - expected)) / np.max(np.abs(expected))
    assert error < rtol


def load_theirs(directory, dtype):
    keyword = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", **{keyword: dtype}, output_loading_info=True
    )
    model, info = model
    assert not any(info.values()), info
    return model


@pytest.mark.parametrize("max_shard_size", [10**9, 20_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_an_export_computes_the_same_in_transformers(name, max_shard_size, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    hf.save(config, params, tmp_path / "out", max_shard_size=max_shard_size)
    model = load_theirs(tmp_path / "out", torch.float64)  # what is left is our own rounding
    rng = np.random.default_rng(0)
    tokens = rng.integers(config.vocab_size, size=(2, 40))
    labels = np.where(rng.random(tokens.shape) < 0.2, -100, tokens)
    theirs = model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels))
    theirs.loss.backward()
    assert_close(qwen2.logits(config, params, jnp.asarray(tokens, jnp.int32)), theirs.logits.detach().numpy())

    def loss(params):
        execution = qwen2.Execution(compute_dtype=jnp.float32)
        hidden = qwen2.hidden_states(config, params, jnp.asarray(tokens, jnp.int32), execution)
        return lm_head_loss(hidden[:, :-1], qwen2.lm_head_weight(params), jnp.asarray(labels[:, 1:]), num_chunks=2)

    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    assert float(value) == pytest.approx(theirs.loss.item(), rel=1e-5)
    leaves = {"/".join(entry.key for entry in path): leaf for path, leaf in jax.tree.leaves_with_path(gradients)}
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {tensor.name for tensor in tensors_of(config)}
    for tensor in tensors_of(config):
        ours = np.asarray(leaves[tensor.parameter] if tensor.layer is None else leaves[tensor.parameter][tensor.layer])
        assert_close(ours.T if tensor.transposed else ours, parameters[tensor.name].grad.numpy())


@pytest.mark.parametrize("name", ["tied", "llama 3.2"])
def test_what_transformers_saves_again_is_the_same_to_the_bit(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config, jnp.bfloat16)
    hf.save(config, params, tmp_path / "ours")
    model = load_theirs(tmp_path / "ours", "auto")
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    again_config, again = hf.load(tmp_path / "theirs")
    assert again_config == config
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_the_tokenizer_of_an_export_is_one_for_transformers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(tmp_path / "bpe.json"))
    config = qwen2.Qwen2Config(300, 32, 1, 4, 2, 40, tie_word_embeddings=True)
    hf.save(config, random_params(config), tmp_path / "out", tokenizer=tmp_path / "bpe.json")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the lazy fox, überall"
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs.eos_token_id == tokenizer.token_to_id("<|endoftext|>")
    model = load_theirs(tmp_path / "out", torch.float32)
    assert model.generation_config.eos_token_id == theirs.eos_token_id
    generated = model.generate(**theirs(text, return_tensors="pt"), max_new_tokens=2, do_sample=False)
    tokens = jnp.asarray(generated.numpy(), jnp.int32)
    assert int(tokens[0, -1]) == int(jnp.argmax(qwen2.logits(*hf.load(tmp_path / "out"), tokens)[0, -2]))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == theirs.eos_token_id


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_generation_is_theirs(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    hf.save(config, params, tmp_path / "out")
    model = load_theirs(tmp_path / "out", torch.float32)
    prompts = [[5, 6, 7, 8, 9], [11, 12], [1, 2, 3, 4, 5, 6, 7]]
    padded = inference.pad_prompts(prompts)
    execution = qwen2.Execution(compute_dtype=jnp.float32)
    ours = [
        inference.generate(
            config, params, *padded, jax.random.key(0), execution=execution, max_new_tokens=9, num_chunks=num_chunks
        ).token_ids.tolist()
        for num_chunks in (1, 3)
    ]
    assert ours[0] == ours[1]
    for prompt, new in zip(prompts, ours[0], strict=True):
        theirs = model.generate(
            torch.tensor([prompt]), max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        assert theirs[0, len(prompt) :].tolist() == new


@pytest.mark.parametrize("name", ["tied", "llama 3.2"])
def test_scores_are_their_log_probabilities(name, tmp_path):
    config = CONFIGS[name]
    params = random_params(config)
    hf.save(config, params, tmp_path / "out")
    model = load_theirs(tmp_path / "out", torch.float32)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, 40))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor(tokens)).logits, dim=-1).numpy()
    theirs = np.take_along_axis(log_probs[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    execution = qwen2.Execution(compute_dtype=jnp.float32)
    ours = inference.score(config, params, jnp.asarray(tokens, jnp.int32), execution=execution, num_chunks=3)
    assert_close(ours[:, 1:], theirs)


def test_adapters_compute_the_same_in_peft(tmp_path):
    peft = pytest.importorskip("peft")
    config = CONFIGS["tied"]
    params, adapted = random_params(config), lora.LoraConfig(4, 12.0, ("q", "o", "down"))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, lora.init(adapted, config, jax.random.key(3)))
    hf.save(config, params, tmp_path / "base")
    hf.save_adapters(adapted, adapters, tmp_path / "adapters", base=str(tmp_path / "base"))
    model = peft.PeftModel.from_pretrained(load_theirs(tmp_path / "base", torch.float32), tmp_path / "adapters")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 9))
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    assert_close(qwen2.logits(config, lora.attach(adapted, params, adapters), jnp.asarray(tokens)), theirs)


# As Llama 3 has it, and one that marks what the assistant says.
TEMPLATES = {
    "chatml": CHATML,
    "llama 3": "{% for message in messages %}"
    "{% set content = '[' + message['role'] + ']\n\n' + message['content'] | trim %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}",
    "marked": "{%- for m in messages %}\n    {{- m.role }}"
    "{% if m.role == 'assistant' %}\n{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m | tojson }}{% endif %}\n{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chats_are_rendered_as_by_them(name, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    data.train_or_load_tokenizer(data.read_corpus(tmp_path / "text.txt"), 300, tmp_path).save(
        str(tmp_path / "bpe.json")
    )
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bpe.json"), bos_token="<s>")
    chat = [{"role": "user", "content": "is <b> & \u00e9\n?"}, {"role": "assistant", "content": "\n it is  "}]
    for messages in (chat, [{"role": "system", "content": "be"}, *chat, *chat]):
        for asked in (False, True):
            expected = theirs.apply_chat_template(
                messages, chat_template=TEMPLATES[name], tokenize=False, add_generation_prompt=asked
            )
            template = ChatTemplate(TEMPLATES[name], name, {"bos_token": "<s>"})
            assert template.render(messages, add_generation_prompt=asked) == expected
        assert "".join(part.text for part in template.parts(messages)) == template.render(messages)
