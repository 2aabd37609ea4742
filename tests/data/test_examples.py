"""JSONL to tokens: what is learnt of them, with whose chat template, and what can be wrong with a line."""

import json
import logging

import pytest

from jaxchunk.data import load_dataset, load_tokenizer, read_corpus, train_or_load_tokenizer
from jaxchunk.data.chat import CHATML, ChatTemplate, Part
from jaxchunk.errors import InputError

CHAT = {
    "messages": [
        {"role": "user", "content": "What is two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And three?"},
        {"role": "assistant", "content": "Seven."},
    ]
}
PAIR = {"prompt": "Name a colour:", "completion": " red"}
TEXT = {"text": "A text of its own."}


@pytest.fixture
def load(tmp_path):
    """Writes lines and loads them; `beside` are files next to a tokenizer that is given then."""

    def load(*lines, vocab_size=300, beside=None, markers=("<|im_start|>", "<|im_end|>")):
        data = tmp_path / "data.jsonl"
        data.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        tokenizer = None
        if beside is not None:
            (tmp_path / "text.txt").write_text("some text of some words")
            tokenizer = tmp_path / "tokenizer.json"
            trained = train_or_load_tokenizer(read_corpus(tmp_path / "text.txt"), 300, tmp_path, markers)
            trained.save(str(tokenizer))
            for name, content in beside.items():
                (tmp_path / name).write_text(content)
        return load_dataset(data, tokenizer, vocab_size, tmp_path / "cache")

    return load


def learnt_texts(dataset):
    """What is learnt of every example, and what is not, in stretches."""
    tokenizer, examples = load_tokenizer(dataset.tokenizer_path), dataset.examples
    found = []
    for start, end in zip(examples.starts, examples.starts[1:], strict=False):
        stretches = []
        for token, mark in zip(examples.tokens[start:end], examples.learnt[start:end], strict=True):
            if not stretches or stretches[-1][1] != mark:
                stretches.append(([], bool(mark)))
            stretches[-1][0].append(int(token))
        found.append([(tokenizer.decode(ids, skip_special_tokens=False), mark) for ids, mark in stretches])
    return found


def test_answers_and_their_ends_are_learnt(load):
    chat, pair, text = learnt_texts(load(CHAT, PAIR, TEXT))
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert chat == [
        (f"{system}<|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Four.<|im_end|>", True),
        ("\n<|im_start|>user\nAnd three?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Seven.<|im_end|>", True),
    ]
    assert pair == [("Name a colour:", False), (" red<|endoftext|>", True)]
    assert text == [("A", False), (" text of its own.<|endoftext|>", True)]  # nothing foretells the first token


def test_markers_are_special_tokens_in_chats_alone(load):
    dataset = load(CHAT, {"prompt": "<|im_end|>", "completion": "x"})
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    ids = dataset.examples.tokens
    second = ids[dataset.examples.starts[1] :].tolist()
    assert (ids == tokenizer.token_to_id("<|im_end|>")).sum() == 5
    assert tokenizer.token_to_id("<|im_end|>") not in second


def test_the_tokenizers_own_template_is_used(load):
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant]{% endif %}"
    config = {"bos_token": {"content": "<s>"}, "eos_token": "<|im_end|>", "chat_template": template}
    expected = [("<s>[user]What is two and two?<|im_end|>[assistant]", False), ("Four.<|im_end|>", True)]
    one = {"messages": CHAT["messages"][:2]}
    assert learnt_texts(load(one, beside={"tokenizer_config.json": json.dumps(config)})) == [expected]
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    beside = {"tokenizer_config.json": json.dumps(config | {"chat_template": named})}
    assert learnt_texts(load(one, beside=beside)) == [expected]
    beside = {"tokenizer_config.json": json.dumps(config | {"chat_template": "no"}), "chat_template.jinja": template}
    assert learnt_texts(load(one, beside=beside)) == [expected]


def test_a_template_may_mark_generation_and_write_json():
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{{ {'<': 1} | tojson }}{% endfor %}"
    )
    template = ChatTemplate(source, "it")
    assert template.parts([{"role": "assistant", "content": "Hi."}]) == [Part('Hi.{"<": 1}', True)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% for m in messages %}", "cannot be compiled"),
        ("{{ raise_exception('no tools here') }}", "refuses the conversation: no tools here"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            r"turn \(message 2\) cannot be found",
        ),
    ],
)
def test_templates_that_cannot_be_used(source, words):
    with pytest.raises(InputError, match=words):
        ChatTemplate(source, "it").parts(CHAT["messages"])


def test_there_must_be_a_template(load):
    with pytest.raises(InputError, match=r"lacks <\|im_start\|> or <\|im_end\|>: give one with a chat_template"):
        load(CHAT, beside={}, markers=())
    assert len(load(PAIR, beside={}, markers=()).examples) == 1
    assert learnt_texts(load(CHAT, beside={})) == learnt_texts(load(CHAT, beside={"chat_template.jinja": CHATML}))
    unnamed = json.dumps({"chat_template": [{"name": "tool_use", "template": ""}]})
    for content, words in (
        ("{", "cannot be read"),
        (unnamed, "has the chat templates tool_use, but none called default"),
    ):
        with pytest.raises(InputError, match=rf"tokenizer_config.json {words}"):
            load(CHAT, beside={"tokenizer_config.json": content})


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "line 2: it is not JSON"),
        ("[1]", "line 2: it is no JSON object"),
        ('{"promt": "a", "completion": "b"}', "line 2: it has 'promt', 'completion', but no 'prompt'"),
        ('{"prompt": "a"}', "line 2: it has 'prompt', but no 'completion'"),
        ('{"txt": "a"}', "line 2: it has 'txt', but no 'text'"),
        ('{"prompt": "a", "completion": null}', "line 2: 'completion' is null; it must be a string"),
        ('{"messages": []}', "line 2: 'messages' must be a list of at least one message"),
        ('{"messages": [{"role": "user"}]}', "line 2: message 1 must be an object with 'role' and 'content'"),
        ('{"messages": [{"role": "bot", "content": ""}]}', "line 2: message 1 has the role 'bot'; it must be one of"),
        ('{"messages": [{"role": "user", "content": []}]}', "line 2: the content of message 1 is a list"),
    ],
)
def test_bad_lines_are_named(load, line, words):
    with pytest.raises(InputError, match=words):
        load(PAIR, line)


def test_what_holds_nothing_is_refused_or_left_out(load, tmp_path, caplog):
    with pytest.raises(InputError, match="holds no example"):
        load("", "  ")
    with pytest.raises(InputError, match="has nothing to learn"):
        load({"prompt": "a", "completion": ""}, {"messages": CHAT["messages"][:1]})
    with pytest.raises(InputError, match=r"cannot read .*nowhere.jsonl"):
        load_dataset(tmp_path / "nowhere.jsonl", None, 300, tmp_path)
    with caplog.at_level(logging.WARNING, "jaxchunk.data"):
        dataset = load(PAIR, {"prompt": "a", "completion": ""}, {"messages": CHAT["messages"][:1]}, "", TEXT)
    assert len(dataset.examples) == 2
    assert "left out 2 of 4 examples" in caplog.text


def test_a_tokenizer_larger_than_the_model_is_refused(load):
    with pytest.raises(InputError, match=r"has ids up to \d+, but the model's vocabulary has 260 entries"):
        load(CHAT, beside={}, vocab_size=260)


def test_the_hash_knows_what_is_learnt(load):
    first = load(PAIR)
    assert first.sha256 == load(PAIR).sha256
    assert first.sha256 != load({"prompt": "Name a colour", "completion": ": red"}).sha256


def test_the_prompt_of_an_example(load):
    dataset = load(TEXT, PAIR)
    assert load_tokenizer(dataset.tokenizer_path).decode(dataset.examples.prompt(1)) == PAIR["prompt"]
