"""A checkpoint's directory: one on this machine, or one of the Hub's in the cache that all Hugging Face tools share."""

import re
from pathlib import Path

from jaxchunk.errors import InputError
from jaxchunk.models.hf.shards import INDEX_FILE
from jaxchunk.models.hf.tokenizer import COMPANIONS, TOKENIZER_FILE

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# No pickles, and nothing of the other formats that some repositories hold as well.
_FILES = ("config.json", INDEX_FILE, "model*.safetensors", TOKENIZER_FILE, *COMPANIONS)


def locate(directory_or_id: str | Path) -> Path:
    """Returns the directory of a checkpoint; what has an id is downloaded where it is not yet in the cache.

    Args:
      directory_or_id: a directory, which is used as it is and without the network; else an id, as in
        "Qwen/Qwen2-0.5B". The cache is that of `huggingface_hub`, whose variables hold (HF_HOME, HF_HUB_OFFLINE).

    Raises:
      InputError: there is neither such a directory nor such an id, or it cannot be downloaded.
    """
    path = Path(directory_or_id)
    if path.is_dir():
        return path
    name = str(directory_or_id)
    if path.exists():
        raise InputError(f"{name} is a file; give the directory that holds config.json and model.safetensors")
    if not _ID.fullmatch(name):
        raise InputError(f"there is no directory {name}, and it is no id of a Hugging Face model either")
    import huggingface_hub  # here, because it takes its time and most uses need no network

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except Exception as error:  # it has no base class of its own, and lets through those of its HTTP client
        reason = " ".join(str(error).split())
        raise InputError(
            f"there is no directory {name}, and Hugging Face's model of that id cannot be had: "
            f"{reason or type(error).__name__}"
        ) from None
