"""JSONL to examples: prompts and conversations as tokens, with a mark on those that are to be learnt."""

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Bool, Int64, UInt32

from jaxchunk.data.chat import ROLES, ChatTemplate, Part
from jaxchunk.data.tokenizer import separator_id
from jaxchunk.errors import InputError

_logger = logging.getLogger("jaxchunk.data")

FORMS = '{"messages": [{"role": ..., "content": ...}, ...]}, {"prompt": ..., "completion": ...} or {"text": ...}'


@dataclass(frozen=True)
class Examples:
    """Examples one after the other, each to be learnt by itself.

    Attributes:
      tokens: the ids of all of them.
      learnt: which of them a model is to learn to give: answers with their end, not prompts.
      starts: where each example begins in `tokens`, and the end of the last.
    """

    tokens: UInt32[np.ndarray, " N"] = field(repr=False)
    learnt: Bool[np.ndarray, " N"] = field(repr=False)
    starts: Int64[np.ndarray, " E+1"] = field(repr=False)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def prompt(self, index: int) -> UInt32[np.ndarray, " P"]:
        """The tokens of an example before the first that is learnt."""
        start, end = self.starts[index : index + 2]
        return self.tokens[start : start + np.argmax(self.learnt[start:end])]


def is_examples(data: str | Path | None) -> bool:
    """Whether the file that is named is one of examples, and not of one running text."""
    return data is not None and Path(data).suffix == ".jsonl"


def read_records(path: Path, needed: tuple[str, ...] = ("prompt", "completion")) -> list[dict[str, Any]]:
    """The lines of a JSONL file of examples, checked; empty lines are passed over.

    Args:
      path: the file.
      needed: what a line with a prompt or a completion must have.

    Raises:
      InputError: the file cannot be read, has no example, or a line is not one of `FORMS`; with the line's number.
    """
    try:
        content = path.read_bytes().decode()
    except OSError as error:
        raise InputError(
            f"cannot read {path}: {error.strerror or error}; give a file of examples, one a line"
        ) from None
    except UnicodeDecodeError as error:
        number = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}, line {number}: it is not UTF-8 text; convert the file") from None
    records = []
    for number, line in enumerate(content.split("\n"), 1):  # splitlines() would cut at U+2028, which JSON may hold
        if line.strip():
            try:
                records.append(_checked(line, needed))
            except InputError as error:
                raise InputError(f"{path}, line {number}: {error}") from None
    if not records:
        raise InputError(f"{path} holds no example: it needs lines such as {FORMS}")
    return records


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """As `read_records`, but a prompt needs no completion."""
    return read_records(path, needed=("prompt",))


def _checked(line: str, needed: tuple[str, ...]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"it is not JSON ({error})") from None
    if not isinstance(record, dict):
        raise InputError(f"it is no JSON object; it must be like {FORMS}")
    if "messages" in record:
        _check_messages(record["messages"])
        return record
    for name in needed if "prompt" in record or "completion" in record else ("text",):
        if name not in record:
            found = ", ".join(map(repr, record)) or "nothing"
            raise InputError(f"it has {found}, but no {name!r}; it must be like {FORMS}")
        if not isinstance(record[name], str):
            raise InputError(f"{name!r} is {_kind(record[name])}; it must be a string")
    return record


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise InputError("'messages' must be a list of at least one message")
    for index, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise InputError(f"message {index} must be an object with 'role' and 'content'")
        if message["role"] not in ROLES:
            raise InputError(f"message {index} has the role {message['role']!r}; it must be one of {', '.join(ROLES)}")
        if not isinstance(message["content"], str):
            raise InputError(f"the content of message {index} is {_kind(message['content'])}; it must be a string")


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(value), f"{value!r}")


def texts_of(records: Iterable[dict[str, Any]]) -> list[str]:
    """All that people and models wrote in the examples, for a tokenizer to be trained on."""
    texts: list[str] = []
    for record in records:
        if "messages" in record:
            texts += [message["content"] for message in record["messages"]]
        else:
            texts += [record[name] for name in ("prompt", "completion", "text") if name in record]
    return texts


class _Rendered(NamedTuple):
    """An example as text. In a chat, the names of special tokens are these tokens."""

    parts: list[Part]
    is_chat: bool


def encode_examples(
    records: list[dict[str, Any]], tokenizer: tokenizers.Tokenizer, template: Callable[[], ChatTemplate], path: Path
) -> Examples:
    """Turns examples into tokens; those in which nothing is learnt are left out, and counted in a notice.

    Learnt are what the assistant says up to and including the token that ends its turn, completions with the
    tokenizer's end of a text, and all of a `text` with that end. Markers of a chat are special tokens wherever they
    stand, as in transformers; in prompts, completions and texts their names are ordinary text.

    Args:
      records: as from `read_records`.
      tokenizer: as from `load_tokenizer`.
      template: gives the chat template; called where there are messages.
      path: the file, for messages.

    Raises:
      InputError: the template is missing or refuses a conversation, or nothing at all is to be learnt.
    """
    rendered = [_render(record, template, f"{path}, example {number}: ") for number, record in enumerate(records, 1)]
    end, special = separator_id(tokenizer), _special_ids(tokenizer)
    tokens, learnt, num_empty = [], [], 0
    for example, part_ids in zip(rendered, _encode(tokenizer, rendered), strict=True):
        ids, marks = _marked(example, part_ids, end, special)
        if not any(marks):
            num_empty += 1
            continue
        useful = len(marks) - marks[::-1].index(True)  # what follows the last token to be learnt teaches nothing
        tokens.append(np.array(ids[:useful], np.uint32))
        learnt.append(np.array(marks[:useful]))
    if num_empty:
        _logger.warning("left out %d of %d examples in %s with nothing to learn in them", num_empty, len(records), path)
    if not tokens:
        raise InputError(f"{path} has nothing to learn: no example has a completion, a text or an assistant's turn")
    starts = np.cumsum([0, *map(len, tokens)], dtype=np.int64)
    return Examples(np.concatenate(tokens), np.concatenate(learnt), starts)


def encode_prompt(
    record: dict[str, Any], tokenizer: tokenizers.Tokenizer, template: Callable[[], ChatTemplate]
) -> list[int]:
    """The tokens that a model is given to go on from; of messages the assistant's turn is left out where it is last.

    Raises:
      InputError: the template is missing or refuses the conversation.
    """
    if messages := record.get("messages"):
        asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = template().render(asked, add_generation_prompt=True)
    else:
        text = record["prompt"] if "prompt" in record else record["text"]
    ((ids,),) = _encode(tokenizer, [_Rendered([Part(text, False)], "messages" in record)])
    return ids


def _render(record: dict[str, Any], template: Callable[[], ChatTemplate], where: str) -> _Rendered:
    if "messages" in record:
        chat = template()
        try:
            return _Rendered(chat.parts(record["messages"]), is_chat=True)
        except InputError as error:
            raise InputError(f"{where}{error}") from None
    if "prompt" in record:
        return _Rendered([Part(record["prompt"], False), Part(record["completion"], True)], is_chat=False)
    return _Rendered([Part(record["text"], True)], is_chat=False)


def _encode(tokenizer: tokenizers.Tokenizer, examples: list[_Rendered]) -> list[list[list[int]]]:
    """The ids of every part of every example.

    Parts are encoded one by one: a token across the border of a prompt and its answer would be one that the model never
    sees when it is asked.
    """
    ids = {}
    for is_chat in (False, True):
        texts = [part.text for example in examples if example.is_chat is is_chat for part in example.parts]
        tokenizer.encode_special_tokens = not is_chat
        try:
            ids[is_chat] = iter(tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        except Exception as error:  # the library raises the bare class for everything
            raise InputError(f"the tokenizer cannot encode the examples: {error}") from None
        finally:
            tokenizer.encode_special_tokens = True
    return [[next(ids[example.is_chat]).ids for _ in example.parts] for example in examples]


def _marked(
    example: _Rendered, part_ids: list[list[int]], end: int | None, special: set[int]
) -> tuple[list[int], list[bool]]:
    """The ids of an example with its end, and which of them are to be learnt."""
    ids: list[int] = []
    marks: list[bool] = []
    for part, own in zip(example.parts, part_ids, strict=True):
        count = len(own)
        if example.is_chat:  # behind its last marker a turn has only the template's glue
            count = next((i + 1 for i in reversed(range(count)) if own[i] in special), count)
        ids += own
        marks += [part.learnt] * count + [False] * (len(own) - count)
    if not example.is_chat and any(marks) and end is not None:
        ids.append(end)
        marks.append(True)
    if marks:
        marks[0] = False  # nothing comes before it that could foretell it
    return ids, marks


def _special_ids(tokenizer: tokenizers.Tokenizer) -> set[int]:
    return {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
