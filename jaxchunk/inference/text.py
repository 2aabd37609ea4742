"""Text in, text out: what a user writes as tokens of a prompt, and tokens of a stream as text."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers

from jaxchunk.data.chat import Message, load_template
from jaxchunk.data.examples import encode_prompt
from jaxchunk.data.tokenizer import stop_ids
from jaxchunk.errors import InputError

_UNFINISHED = "\ufffd"  # what a decoder makes of the first bytes of a character


def encode(
    text: str, tokenizer: tokenizers.Tokenizer, tokenizer_path: Path, *, chat: bool = False, system: str | None = None
) -> list[int]:
    """The tokens of a prompt.

    Args:
      text: what to go on from; with `chat` what the user says.
      tokenizer: as from `data.load_fitting_tokenizer`.
      tokenizer_path: its file; the chat template is looked for beside it.
      chat: whether the text is put into the chat template, with the words that ask for an answer.
      system: the system's message in the chat; None leaves it to the template.

    Raises:
      InputError: the prompt is empty, or there is no chat template that takes it.
    """
    if not text:
        raise InputError("the prompt is empty; give it at least one token")
    if not chat:
        return encode_prompt({"prompt": text}, tokenizer, lambda: load_template(tokenizer_path, tokenizer))
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    return encode_prompt({"messages": messages}, tokenizer, lambda: load_template(tokenizer_path, tokenizer))


def find_stops(names: Sequence[str], tokenizer: tokenizers.Tokenizer) -> tuple[int, ...]:
    """The ids of the tokens that end an answer: the tokenizer's ends of texts and turns, and those that are named.

    Raises:
      InputError: there is no such token.
    """
    ids = dict.fromkeys(stop_ids(tokenizer))
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise InputError(f"--stop has {name!r}, which is no token of the tokenizer; give tokens as it writes them")
        ids[token_id] = None
    return tuple(ids)


def decode_stream(token_ids: Iterable[int], tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """Pieces of text as they are complete: one token can be a part of a character.

    Some decoders look at a token's neighbours (for spaces, say), so that a piece is what a token adds to the text of
    those since the last complete character, and not the token's own text.
    """
    pending: list[int] = []
    shown = ""
    for token_id in token_ids:
        pending.append(token_id)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        if text.endswith(_UNFINISHED):
            continue
        yield text[len(shown) :]
        pending, shown = pending[-1:], tokenizer.decode(pending[-1:], skip_special_tokens=False)
    rest = tokenizer.decode(pending, skip_special_tokens=False) if pending else ""
    if len(rest) > len(shown):
        yield rest[len(shown) :]
