"""What a record must carry to be worth anything later: versions, device, driver, flags, commit."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.extend

import jaxchunk

_PACKAGES = (
    *("jax", "jaxlib", "numpy", "optax", "grain", "orbax-checkpoint", "tokenizers", "safetensors"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13"),
    # Of peers (bench/peers.py):
    *("torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl"),
)
_VARIABLES = ("XLA_", "JAX_", "JAXCHUNK_", "CUDA_VISIBLE_DEVICES", "NVIDIA_TF32_OVERRIDE")


def describe_environment(device_details: dict[str, Any] | None = None) -> dict[str, Any]:
    """The environment as JSON-serialisable values.

    Args:
      device_details: what telemetry knows of the device (driver, power limit, ...), stored under "gpu".
    """
    device = jax.local_devices()[0]
    return {
        "jaxchunk": jaxchunk.__version__,
        "git_commit": git_commit(),
        "source_sha256": source_sha256(),
        "command": sys.argv,
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "backend": jax.default_backend(),
        "platform_version": jax.extend.backend.get_backend().platform_version,
        "device_kind": device.device_kind,
        "device_count": jax.device_count(),
        "compute_capability": getattr(device, "compute_capability", None),
        "memory_limit_bytes": (device.memory_stats() or {}).get("bytes_limit"),
        "variables": {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)},
        "gpu": device_details,
    }


def git_commit() -> str | None:
    """The checkout's commit, with "-dirty" where files differ from it; None where this file is in no checkout."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # another repository may surround an installed package
        return _git("describe", "--always", "--dirty", "--abbrev=12").strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    where = Path(__file__).parent
    return subprocess.run(command, cwd=where, capture_output=True, text=True, check=True, timeout=10).stdout


def source_sha256() -> str:
    """Digest of the package's source files and tables: says what ran also where there is no checkout."""
    digest = hashlib.sha256()
    package = Path(__file__).parent
    for path in sorted(path for pattern in ("*.py", "*.json") for path in package.rglob(pattern)):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
