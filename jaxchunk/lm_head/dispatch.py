"""Which implementation runs: chosen by device when none is named, refused with a reason when a named one cannot."""

import functools
import logging
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.extend
from jax import Array
from jax.sharding import AbstractDevice
from jax.typing import DTypeLike

from jaxchunk.lm_head import label_rows
from jaxchunk.lm_head.chunked import RowKernels
from jaxchunk.lm_head.kernels import Exponentials, xla
from jaxchunk.lm_head.rows import RowOptions, RowStatistics
from jaxchunk.lm_head.sharding import Placement
from jaxchunk.lm_head.target import target_device

Implementation = Literal["reference", "xla", "pallas", "pallas_interpret", "fused", "fused_xla", "fused_interpret"]

FUSED = ("fused", "fused_xla", "fused_interpret")
_IN_A_KERNEL = ("fused", "fused_interpret")  # those of them whose exponentials are taken where the logits are made
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # devices of compute capability 9.0
_FLOAT32_ONLY = "its statistics are float32 and the compute dtype is"
_BFLOAT16_ONLY = "it multiplies bfloat16 and the compute dtype is"
_logger = logging.getLogger("jaxchunk")


class Choice(NamedTuple):
    """An implementation and, in words, why it was taken."""

    implementation: Implementation
    reason: str


class Head(NamedTuple):
    """What of a call decides whether the fused implementation can run.

    Attributes:
      width: D.
      columns: of the vocabulary on each device.
      vocab_dim: the dimension of the weight that is V.
      options: what is done to a row; None where nothing is that a call has to name.
    """

    width: int
    columns: int
    vocab_dim: int = 0
    options: RowOptions | None = None


def choose_implementation(
    implementation: str | None = None,
    *,
    compute_dtype: DTypeLike = "bfloat16",
    platform: str | None = None,
    head: Head | None = None,
) -> Choice:
    """Settles on an implementation of `lm_head_loss`.

    Args:
      implementation: a name, or None to choose by device.
      compute_dtype: dtype of the logits.
      platform: "cpu", "gpu" or "tpu"; None for the platform that JAX would run on now.
      head: what the fused implementation has to know; without it, only the device and the dtype decide.

    Returns:
      The implementation and the reason for it.

    Raises:
      ValueError: the name is unknown, or the named implementation cannot run here.
    """
    platform = platform or default_platform()
    if implementation is None:
        return _fastest(platform, jax.numpy.dtype(compute_dtype), head)
    if implementation not in get_args(Implementation):
        names = ", ".join(name for name in get_args(Implementation) if "_" not in name)  # the others are for tests
        raise ValueError(f"implementation is {implementation!r}; it must be one of {names}, or left out")
    if implementation == "pallas":
        obstacle = pallas_obstacle(platform, jax.numpy.dtype(compute_dtype))
        if obstacle is not None:
            raise ValueError(f"implementation='pallas' cannot run: {obstacle}; use 'xla', or leave it out")
    if implementation in FUSED:
        obstacle = _named_fused_obstacle(implementation, platform, jax.numpy.dtype(compute_dtype), head)
        if obstacle is not None:
            others = "'xla'" if pallas_obstacle(platform, jax.numpy.dtype(compute_dtype)) else "'pallas' or 'xla'"
            raise ValueError(f"implementation={implementation!r} cannot run: {obstacle}; use {others}, or leave it out")
    if implementation == "pallas_interpret" and jax.numpy.dtype(compute_dtype).itemsize > 4:
        raise ValueError(f"implementation='pallas_interpret' cannot run: {_FLOAT32_ONLY} {compute_dtype}; use 'xla'")
    return Choice(implementation, "named by the caller")  # type: ignore[arg-type]


def _fastest(platform: str, compute_dtype: jax.numpy.dtype, head: Head | None) -> Choice:
    obstacle = pallas_obstacle(platform, compute_dtype)
    if obstacle is not None:
        return Choice("xla", f"pallas cannot run: {obstacle}")
    if not is_hopper():  # `fused` may be able to run, but nobody has measured it on such a device
        return Choice("pallas", "the device is an NVIDIA GPU")
    obstacle = _mosaic_obstacle(compute_dtype, head)
    if obstacle is not None:
        return Choice("pallas", f"the device is an NVIDIA GPU; fused cannot run: {obstacle}")
    return Choice("fused", "the device is a Hopper GPU")


def row_kernels(implementation: Implementation) -> RowKernels:
    """The row kernels of a chunked implementation; the same objects every time, so that jit caches hold."""
    if implementation == "xla":
        return RowKernels(xla.statistics, xla.gradients, xla.statistics_and_gradients)
    if implementation == "pallas_interpret":
        return _triton_kernels(interpret=True)
    kernels = _triton_kernels(interpret=False)
    return kernels._replace(statistics_and_gradients=_both_passes_on_hopper) if is_hopper() else kernels


def rows_multiple(implementation: Implementation) -> int:
    """What the number of rows in a chunk must be a multiple of."""
    return 8 if implementation in _IN_A_KERNEL else 1


def makes_logits(implementation: str) -> bool:
    """Whether a chunk's logits are ever in memory where no gradients are asked for."""
    return implementation not in _IN_A_KERNEL


def exponentials(implementation: Implementation) -> Callable[..., Exponentials]:
    """The kernel of a fused implementation; the same object every time, so that jit caches hold."""
    return _exponentials(implementation, on_hopper=implementation == "fused_interpret" or is_hopper())


@functools.cache
def _exponentials(implementation: Implementation, *, on_hopper: bool) -> Callable[..., Exponentials]:
    if implementation == "fused_xla":
        return xla.exponentials
    if not on_hopper:
        from jaxchunk.lm_head.kernels import triton_gemm

        return triton_gemm.exponentials
    from jaxchunk.lm_head.kernels import mosaic  # imported on demand: JAX 0.10 has not all that it needs

    return functools.partial(mosaic.exponentials, interpret=implementation == "fused_interpret")


@functools.cache
def add_label_rows(implementation: Implementation) -> Callable[..., Array]:
    """How a fused implementation adds rows to those of their labels (`label_rows.py`); the same object every time."""
    if implementation == "fused_xla":
        return label_rows.add_label_rows
    from jaxchunk.lm_head.kernels import triton_label_rows

    return functools.partial(triton_label_rows.add_label_rows, interpret=implementation == "fused_interpret")


@functools.cache
def _triton_kernels(interpret: bool) -> RowKernels:
    from jaxchunk.lm_head.kernels import triton  # imported on demand: JAX may one day come without it

    return RowKernels(
        functools.partial(triton.statistics, interpret=interpret),
        functools.partial(triton.gradients, interpret=interpret),
        functools.partial(triton.statistics_and_gradients, interpret=interpret),
    )


def _both_passes_on_hopper(
    raw: Array, labels: Array, row_weight: Array, bias: Array | None, options: RowOptions
) -> tuple[RowStatistics, Array]:
    """The row kernel that reads logits once, where it can run; else Triton's, which runs everywhere."""
    obstacle = _mosaic_rows_obstacle(raw, bias)
    _log_row_kernel(obstacle, raw.shape[1])
    if obstacle is not None:
        return _triton_kernels(interpret=False).statistics_and_gradients(raw, labels, row_weight, bias, options)
    from jaxchunk.lm_head.kernels import mosaic_rows

    return mosaic_rows.statistics_and_gradients(raw, labels, row_weight, bias, options)


def _mosaic_rows_obstacle(raw: Array, bias: Array | None) -> str | None:
    V = raw.shape[1]
    if raw.dtype != jax.numpy.bfloat16:
        return f"logits are {raw.dtype} and it reads bfloat16"
    if bias is not None:
        return "it adds no bias"
    try:
        from jaxchunk.lm_head.kernels import mosaic_rows
    except ImportError as error:
        return f"JAX {jax.__version__} has not what it is made of ({error})"
    if V % mosaic_rows.COLUMNS_MULTIPLE:
        return f"V is {V} and must be a multiple of {mosaic_rows.COLUMNS_MULTIPLE} (on each device)"
    return None if mosaic_rows.choose_config(V) else f"a row of {V} columns is more than a cluster of blocks can hold"


@functools.cache
def _log_row_kernel(obstacle: str | None, V: int) -> None:
    """Says once for every combination which row kernel runs and why."""
    if obstacle is None:
        _logger.info("lm_head_loss: rows of %d logits are read once, by Mosaic GPU", V)
    else:
        _logger.info("lm_head_loss: rows of %d logits are read twice, by Triton (Mosaic GPU cannot: %s)", V, obstacle)


def check_placement(choice: Choice, placement: Placement) -> None:
    """Refuses implementations that cannot run on a mesh.

    Raises:
      ValueError: the implementation is "reference" on named axes, or an interpreted one inside of `jax.shard_map`.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if choice.implementation == "reference" and (placement.token_axes or placement.vocab_axes):
        raise ValueError("implementation='reference' cannot run: it knows no mesh axes; use 'xla', or leave it out")
    if choice.implementation in ("pallas_interpret", "fused_interpret") and (placement.mesh is not None or manual):
        raise ValueError(
            f"implementation={choice.implementation!r} cannot run: JAX's Pallas interpreter does not work inside of "
            "jax.shard_map; use 'xla', or leave it out"
        )


def default_platform() -> str:
    """The platform that traced code is meant for."""
    return target_device().platform


@functools.cache
def log_choice(choice: Choice, chunk_rows: int, num_chunks: int) -> None:
    """Says once for every combination what runs and why."""
    chunks = "unchunked" if choice.implementation == "reference" else f"{num_chunks} x {chunk_rows} tokens"
    _logger.info("lm_head_loss: %s, %s (%s)", choice.implementation, chunks, choice.reason)


def pallas_obstacle(platform: str, compute_dtype: jax.numpy.dtype) -> str | None:
    """Why kernels in Pallas Triton cannot run on a platform; None where they can."""
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU and JAX runs on {platform}"
    if "rocm" in _platform_version():
        return "it needs an NVIDIA GPU and this one is AMD's"
    if compute_dtype.itemsize > 4:
        return f"{_FLOAT32_ONLY} {compute_dtype}"
    capability = _compute_capability()
    if capability is not None and int(capability.split(".")[0]) < 8:  # XLA compiles no Triton for it
        return f"it needs compute capability 8.0 and this device has {capability}"
    try:
        from jax.experimental.pallas import triton  # noqa: F401
    except ImportError:
        return f"JAX {jax.__version__} has no Pallas Triton back end"
    return None


def _fused_obstacle(platform: str, compute_dtype: jax.numpy.dtype, head: Head | None) -> str | None:
    obstacle = pallas_obstacle(platform, compute_dtype)
    if obstacle is not None:
        return obstacle
    if is_hopper():
        return _mosaic_obstacle(compute_dtype, head)
    if compute_dtype != jax.numpy.bfloat16:
        return f"{_BFLOAT16_ONLY} {compute_dtype}"
    return _head_obstacle(head)


def is_hopper() -> bool:
    """Whether the device has what the Mosaic GPU kernel is made of, and JAX what it is written in."""
    return _compute_capability() == "9.0" and jax.version.__version_info__ >= (0, 11)


def _named_fused_obstacle(
    implementation: str, platform: str, compute_dtype: jax.numpy.dtype, head: Head | None
) -> str | None:
    if implementation == "fused":
        return _fused_obstacle(platform, compute_dtype, head)
    return _mosaic_obstacle(compute_dtype, head) if implementation == "fused_interpret" else _head_obstacle(head)


def _mosaic_obstacle(compute_dtype: jax.numpy.dtype, head: Head | None) -> str | None:
    if jax.version.__version_info__ < (0, 11):
        return f"it needs JAX 0.11 and this is {jax.__version__}"
    if compute_dtype != jax.numpy.bfloat16:
        return f"{_BFLOAT16_ONLY} {compute_dtype}"
    if head is not None and (head.width % 16 or head.columns % 16):
        return f"D and V must be multiples of 16, and they are {head.width} and {head.columns} (on each device)"
    return _head_obstacle(head)


def _head_obstacle(head: Head | None) -> str | None:
    """What the algorithm does not do, on any device."""
    if head is None:
        return None
    if head.vocab_dim != 0:
        return "it needs weight_layout='vd'"
    if head.options is not None and head.options.label_smoothing and head.options.softcap is not None:
        return "label smoothing of softcapped logits needs a sum over them that it does not take"
    return None


def _compute_capability() -> str | None:
    """Of the device that traced code is meant for."""
    device = target_device()
    if isinstance(device, AbstractDevice):
        return "9.0" if any(word in _HOPPER for word in device.device_kind.split()) else None
    return getattr(device, "compute_capability", None)


def _platform_version() -> str:
    try:
        return jax.extend.backend.get_backend("gpu").platform_version
    except (RuntimeError, AttributeError):
        return ""  # lowering for a GPU on a machine without one
