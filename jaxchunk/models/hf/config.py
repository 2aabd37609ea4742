"""`config.json` of Hugging Face to `Qwen2Config` and back; what is not known is refused, never guessed."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxchunk.errors import InputError
from jaxchunk.models.qwen2 import Qwen2Config
from jaxchunk.models.rope import Llama3Rope


class _Family(NamedTuple):
    """What transformers fixes by `model_type`, and the defaults that it fills in."""

    architecture: str
    attention_bias: bool
    max_position_embeddings: int


_FAMILIES = {
    "qwen2": _Family("Qwen2ForCausalLM", attention_bias=True, max_position_embeddings=32768),
    "llama": _Family("LlamaForCausalLM", attention_bias=False, max_position_embeddings=2048),
}

# Keys that change neither logits nor gradients: how the model is run, stored or sampled from, and where it comes from.
_WITHOUT_EFFECT = (
    *("_attn_implementation_autoset", "_name_or_path", "attn_implementation", "bos_token_id", "dtype", "eos_token_id"),
    *("id2label", "label2id", "max_window_layers", "name_or_path", "output_attentions", "output_hidden_states"),
    *("pad_token_id", "pretraining_tp", "return_dict", "sliding_window", "torch_dtype", "transformers_version"),
    *("unsloth_fixed", "unsloth_version", "use_cache"),
)

# Keys that would change the arithmetic, with the one value that is implemented.
_ONLY = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "use_mrope": False,
    "use_sliding_window": False,
}

_REQUIRED: Any = object()


def load_config(directory: Path) -> Qwen2Config:
    """Reads `config.json` of a checkpoint.

    Raises:
      InputError: it is missing or damaged, or describes what `qwen2` does not compute.
    """
    path = directory / "config.json"
    return parse_config(read_json_object(path), str(path))


def read_json_object(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises:
      InputError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}; a checkpoint needs it") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a {type(values).__name__}; it must hold a JSON object")
    return values


def parse_config(values: dict[str, Any], source: str) -> Qwen2Config:
    """The architecture that a `config.json` of Qwen2, Qwen2.5 or Llama describes.

    Args:
      values: the file's content, in the layout of transformers 4 (`rope_theta`, `rope_scaling`) or 5
        (`rope_parameters`).
      source: where it is from, for error messages.

    Raises:
      InputError: a key that could change what the model computes is unknown, or has a value that is not implemented.
    """
    keys = _Keys(values, source)
    family = _family(keys)
    num_heads = keys.take("num_attention_heads", int)
    hidden_size = keys.take("hidden_size", int)
    num_layers = keys.take("num_hidden_layers", int)
    rope_theta, rope_scaling = _rope(keys)
    fields: dict[str, Any] = {
        "vocab_size": keys.take("vocab_size", int),
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": keys.take("num_key_value_heads", int, num_heads),
        "intermediate_size": keys.take("intermediate_size", int),
        "tie_word_embeddings": keys.take("tie_word_embeddings", bool, False),
        "rope_theta": rope_theta,
        "rms_norm_eps": keys.take("rms_norm_eps", float, 1e-6),
        "max_position_embeddings": keys.take("max_position_embeddings", int, family.max_position_embeddings),
        "initializer_range": keys.take("initializer_range", float, 0.02),
        "attention_bias": family.attention_bias,
        "rope_scaling": rope_scaling,
    }
    keys.only("attention_bias", family.attention_bias)
    keys.only("head_dim", hidden_size // num_heads)
    keys.only("layer_types", ["full_attention"] * num_layers)
    for name, value in _ONLY.items():
        keys.only(name, value)
    keys.finish()
    try:
        return Qwen2Config(**fields)
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def to_hf_config(config: Qwen2Config, dtype: str) -> dict[str, Any]:
    """The content of a `config.json` that transformers 4 and 5 both read (5 reads the old names too).

    Args:
      config: the architecture; with attention biases it is called Qwen2, without them Llama.
      dtype: dtype of the stored weights, as in "bfloat16".
    """
    model_type = "qwen2" if config.attention_bias else "llama"
    values: dict[str, Any] = {
        "architectures": [_FAMILIES[model_type].architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_dropout": 0.0,
        "use_cache": True,
        "torch_dtype": dtype,
        "bos_token_id": None,  # Llama's default would name two entries of another vocabulary
        "eos_token_id": None,
    }
    if config.rope_scaling is not None:
        values["rope_scaling"] = {"rope_type": "llama3"} | vars(config.rope_scaling)
    return values | ({"use_sliding_window": False} if config.attention_bias else {"attention_bias": False})


class _Keys:
    """The keys of a file, taken one by one; what is left at the end is unknown."""

    def __init__(self, values: dict[str, Any], source: str):
        self.source = source
        self._left = dict(values)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Removes and returns a value of type `kind`; `default` where it is missing or null."""
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise InputError(f"{self.source} has no {name}, which is needed")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise InputError(f"{self.source}: {name} is {value!r}; it must be of type {kind.__name__}")
        if isinstance(value, int | float) and kind is not bool and not 0 < value < float("inf"):
            raise InputError(f"{self.source}: {name} is {value!r}; it must be greater than 0")
        return value

    def only(self, name: str, implemented: Any) -> None:
        """Removes a value that must be the implemented one, if it is there."""
        value = self._left.pop(name, None)
        if value is not None and value != implemented:
            raise InputError(f"{self.source}: {name} is {value!r}; only {implemented!r} is implemented")

    def finish(self) -> None:
        """Refuses what is left. A null is as good as nothing."""
        unknown = sorted(
            name for name, value in self._left.items() if value is not None and name not in _WITHOUT_EFFECT
        )
        if unknown:
            raise InputError(
                f"{self.source}: {', '.join(unknown)} not known here; it may change what the model computes, so this "
                "checkpoint is not loaded"
            )


def _family(keys: _Keys) -> _Family:
    model_type = keys.take("model_type", str)
    if model_type not in _FAMILIES:
        raise InputError(f"{keys.source}: model_type is {model_type!r}; it must be {' or '.join(_FAMILIES)}")
    family = _FAMILIES[model_type]
    architectures = keys.take("architectures", list, [family.architecture])
    if architectures != [family.architecture]:
        raise InputError(f"{keys.source}: architectures is {architectures}; it must be [{family.architecture!r}]")
    return family


def _rope(keys: _Keys) -> tuple[float, Llama3Rope | None]:
    """Base and stretching, from the old place, the new one, or both where they agree."""
    theta = keys.take("rope_theta", float, None)
    old = keys.take("rope_scaling", dict, None)
    new = keys.take("rope_parameters", dict, None)
    parsed = [_rope_parameters(values, f"{keys.source}: {place}") for place, values in
              (("rope_scaling", old), ("rope_parameters", new)) if values is not None]  # fmt: skip
    thetas = {value for value in (theta, *(theta for theta, _ in parsed)) if value is not None}
    scalings = {scaling for _, scaling in parsed}
    if len(thetas) > 1 or len(scalings) > 1:
        raise InputError(f"{keys.source}: rope_theta, rope_scaling and rope_parameters contradict one another")
    return next(iter(thetas), 10000.0), next(iter(scalings), None)


def _rope_parameters(values: dict[str, Any], source: str) -> tuple[float | None, Llama3Rope | None]:
    keys = _Keys(values, source)
    theta = keys.take("rope_theta", float, None)
    keys.only("partial_rotary_factor", 1.0)
    kind = keys.take("type", str, "default")  # its name before transformers 4.45
    kind = keys.take("rope_type", str, kind)
    scaling = None
    if kind == "llama3":
        context = keys.take("original_max_position_embeddings", int)
        low, high = keys.take("low_freq_factor", float), keys.take("high_freq_factor", float)
        factor = keys.take("factor", float)
        try:
            scaling = Llama3Rope(factor, low, high, context)
        except ValueError as error:
            raise InputError(f"{source}: {error}") from None
    elif kind != "default":
        raise InputError(f"{source} is of type {kind!r}; only default and llama3 are implemented")
    keys.finish()
    return theta, scaling
