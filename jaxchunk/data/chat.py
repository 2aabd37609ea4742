"""Chat templates: a conversation as the text that a model is given, and which parts of it the assistant wrote."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from jaxchunk.errors import InputError

Message: TypeAlias = dict[str, Any]
"""`role` and `content`, both strings; what else is in it is the template's."""

ROLES = ("system", "user", "assistant", "tool")
CHATML_MARKERS = ("<|im_start|>", "<|im_end|>")
# Qwen2's own template.
CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# What a tokenizer_config.json names for its template.
_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def has_chatml(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a tokenizer has the markers of ChatML as tokens."""
    return all(tokenizer.token_to_id(marker) is not None for marker in CHATML_MARKERS)


class Part(NamedTuple):
    """A piece of a rendered conversation, and whether it is what the assistant wrote (its end token included)."""

    text: str
    learnt: bool


class ChatTemplate:
    """Renders conversations as transformers' `apply_chat_template` does, in Jinja's sandbox.

    One difference: templates are not told the date, since the same data must give the same tokens tomorrow; those of
    Llama 3 have one of their own then.
    """

    def __init__(self, source: str, description: str, special_tokens: dict[str, str] | None = None):
        """Compiles a template.

        Args:
          source: in Jinja's language.
          description: where it is from, for people.
          special_tokens: names that it may use, such as `bos_token`.

        Raises:
          InputError: it is not in Jinja's language.
        """
        self.source = source
        self.description = description
        self._special_tokens = special_tokens or {}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"the chat template of {description} cannot be compiled: {error}") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The conversation as text; with what begins an assistant's turn at its end, if so asked.

        Raises:
          InputError: the template refuses it.
        """
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._special_tokens
            )
        except Exception as error:  # a template is a program: anything can go wrong in it
            raise InputError(f"the chat template of {self.description} refuses the conversation: {error}") from None

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The rendered conversation, cut where the assistant's turns begin and end.

        A turn is what its message adds to the conversation before it and the words that ask for an answer. That holds
        only where a conversation's text begins with the text of its beginning, which is checked.

        Raises:
          InputError: the template refuses the conversation, or renders its beginning in another way once it goes on.
        """
        whole = self.render(messages)
        parts, position = [], 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self.render(messages[:index], add_generation_prompt=True)
            after = self.render(messages[: index + 1])
            if not (after.startswith(before) and whole.startswith(after) and len(before) >= position):
                raise InputError(
                    f"the assistant's turn (message {index + 1}) cannot be found in what the chat template of "
                    f"{self.description} makes of the conversation: it changes what comes before a turn when the turn "
                    "is added; give each of its turns as a prompt and a completion"
                )
            parts += [Part(whole[position : len(before)], False), Part(after[len(before) :], True)]
            position = len(after)
        return [part for part in (*parts, Part(whole[position:], False)) if part.text]


def load_template(tokenizer_path: Path, tokenizer: tokenizers.Tokenizer) -> ChatTemplate:
    """The template beside a `tokenizer.json`; ChatML, as Qwen2 has it, where there is none.

    Args:
      tokenizer_path: `chat_template.jinja` and `tokenizer_config.json` are looked for in the same directory.
      tokenizer: what is in that file.

    Raises:
      InputError: a file is damaged, or there is no template and the tokenizer lacks ChatML's markers.
    """
    path = tokenizer_path.with_name("tokenizer_config.json")
    config = _read_config(path)
    special_tokens = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name))) is not None}
    source = config.get("chat_template")
    if isinstance(source, list):  # several, by name
        templates = {entry["name"]: entry["template"] for entry in source}
        if "default" not in templates:
            raise InputError(f"{path} has the chat templates {', '.join(templates)}, but none called default")
        source = templates["default"]
    if (file := tokenizer_path.with_name("chat_template.jinja")).is_file():
        path, source = file, _read_text(file)
    if source is not None:
        return ChatTemplate(source, str(path), special_tokens)
    if not has_chatml(tokenizer):
        raise InputError(
            f"messages need a chat template, and beside the tokenizer {tokenizer_path} there is none; nor can it be "
            f"ChatML, since the tokenizer lacks {' or '.join(CHATML_MARKERS)}: give one with a chat_template in its "
            "tokenizer_config.json; prompts and completions need none, nor does generate.py without --chat"
        )
    return ChatTemplate(CHATML, "ChatML")


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`, which mark the assistant's words in some templates: as if not there."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's way)

    def parse(self, parser: Any) -> Any:
        """Gives the statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **options: Any) -> str:  # Jinja's own escapes HTML
        return json.dumps(value, ensure_ascii=False, indent=indent, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    return environment


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(_read_text(path))
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return config if isinstance(config, dict) else {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _token_text(token: Any) -> str | None:
    """Some files give a token's name, others an object with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
