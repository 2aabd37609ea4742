"""The phases of two workloads on a device: durations from a roofline, in the order in which kernels run.

Times are at the reference clock of the device's profile; the plant makes them longer or shorter. Every function returns
a list of `Phase`, in which idle phases are the pauses between kernels.
"""

import math
from dataclasses import dataclass

from jaxchunk.errors import InputError
from jaxchunk.models import qwen2
from jaxchunk.telemetry.simulation.plant import Phase
from jaxchunk.training.flops import training_flops_per_token

ELEMENT_BYTES = {"bfloat16": 2, "float32": 4}
# A product that also moves bytes takes (compute^p + memory^p)^(1/p): 1 is no overlap, infinity perfect overlap.
OVERLAP_EXPONENT = 3.0
# Elements that one token moves in a layer's forward pass beside the matrix products, in units of D and of F: norms,
# residuals, rotary embedding and attention; the gate. The backward pass is taken to move and compute twice as much.
LAYER_TRAFFIC_D, LAYER_TRAFFIC_F = 16, 3
ADAMW_BYTES_PER_PARAMETER = 28  # float32 weight, two moments and gradient read, all but the gradient written
PIECES_PER_LAYER = 3  # alternations of compute and memory in one pass through a layer


@dataclass(frozen=True)
class Roofline:
    """What a device attains at its reference clock.

    `flops_per_s` are rates of matrix products by dtype, FLOP/s; `launch_s` passes idle before every kernel.

    Raises:
      InputError: a number that is not positive, or a dtype that the workloads do not know.
    """

    flops_per_s: dict[str, float]
    bandwidth_bytes_per_s: float
    launch_s: float = 0.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not self.flops_per_s or not self.flops_per_s.keys() <= ELEMENT_BYTES.keys():
            raise InputError(
                f"roofline.flops_per_s is given for {sorted(self.flops_per_s) or 'no dtype'}, needed is one or more of "
                f"{sorted(ELEMENT_BYTES)}"
            )
        rates = {f"flops_per_s.{dtype}": rate for dtype, rate in self.flops_per_s.items()}
        for label, value in (rates | {"bandwidth_bytes_per_s": self.bandwidth_bytes_per_s}).items():
            if not 0 < value < math.inf:
                raise InputError(f"roofline.{label} is {value}, needed is a positive number")
        if not 0 <= self.launch_s < math.inf:
            raise InputError(f"roofline.launch_s is {self.launch_s}, needed is a number from 0 up")


@dataclass(frozen=True)
class _Work:
    """Makes phases for one roofline, dtype and activity."""

    roofline: Roofline
    dtype: str
    activity: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in self.roofline.flops_per_s:
            raise InputError(
                f"the device has no rate for {self.dtype} in roofline.flops_per_s, which the workload needs; it has "
                f"{sorted(self.roofline.flops_per_s)}"
            )

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    def product(self, flops: float, num_bytes: float) -> list[Phase]:
        """A matrix product: its arithmetic, and the part of its traffic that does not hide behind it."""
        compute_s = flops / self.roofline.flops_per_s[self.dtype]
        memory_s = num_bytes / self.roofline.bandwidth_bytes_per_s
        p = OVERLAP_EXPONENT
        exposed_s = (compute_s**p + memory_s**p) ** (1 / p) - compute_s
        return self._kernel(Phase("compute", compute_s, self.activity), Phase("memory", exposed_s, self.activity))

    def pass_over(self, num_bytes: float) -> list[Phase]:
        """A kernel that waits for memory."""
        return self._kernel(Phase("memory", num_bytes / self.roofline.bandwidth_bytes_per_s, self.activity))

    def _kernel(self, *phases: Phase) -> list[Phase]:
        launch = [Phase("idle", self.roofline.launch_s)] if self.roofline.launch_s else []
        return launch + list(phases)


def microbenchmark(
    roofline: Roofline, num_chunks: int, *, m: int, k: int, n: int, dtype: str, sum_dtype: str, activity: float = 1.0
) -> list[Phase]:
    """One iteration of the paper's microbenchmark: A [m, k] times B [n, k]^T, softmax, C^T A added to D [n, k].

    Args:
      roofline: the device.
      num_chunks: chunks of the m rows; where they do not divide m, all are as long as the mean.
      m: rows.
      k: inner width.
      n: columns.
      dtype: of A, B and C.
      sum_dtype: of D.
      activity: of all phases: 1 for random operands.

    Raises:
      InputError: `num_chunks` is not from 1 to m, or the device has no rate for `dtype`.
    """
    work = _Work(roofline, dtype, activity)
    rows = _rows(m, num_chunks)
    chunk_bytes = rows * n * work.element_bytes
    sum_bytes = 2 * ELEMENT_BYTES[sum_dtype] * n * k
    flops = 2.0 * rows * k * n
    return num_chunks * [
        *work.product(flops, chunk_bytes),
        *work.pass_over(2 * chunk_bytes),
        *work.product(flops, chunk_bytes + sum_bytes),
    ]


def training_step(
    roofline: Roofline, num_chunks: int, *, model: str, batch_size: int, seq_len: int, dtype: str
) -> list[Phase]:
    """One training step of a Qwen2 model with AdamW, its LM head in chunks of tokens.

    Args:
      roofline: the device.
      num_chunks: of the LM head.
      model: a name of `qwen2.SIZES`.
      batch_size: sequences in a step, in one micro-batch.
      seq_len: tokens in a sequence.
      dtype: of activations and products.

    Raises:
      InputError: `num_chunks` is not from 1 to the number of tokens, or the device has no rate for `dtype`.
    """
    work, config, tokens = _Work(roofline, dtype), qwen2.SIZES[model], batch_size * seq_len
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    forward_flops = tokens * (training_flops_per_token(config, seq_len) - 6.0 * V * D) / (3 * L)
    forward_bytes = tokens * (LAYER_TRAFFIC_D * D + LAYER_TRAFFIC_F * F) * work.element_bytes
    piece = [
        *work.product(forward_flops / PIECES_PER_LAYER, 0.0),
        *work.pass_over(forward_bytes / PIECES_PER_LAYER),
    ]
    forward = L * PIECES_PER_LAYER * piece
    optimizer = work.pass_over(ADAMW_BYTES_PER_PARAMETER * qwen2.num_params(config))
    return [*forward, *_lm_head(work, tokens, D, V, num_chunks), *forward, *forward, *optimizer]


def _lm_head(work: _Work, tokens: int, D: int, V: int, num_chunks: int) -> list[Phase]:
    """Logits, their row kernel (one read, one write), dX, and dW added to a float32 sum."""
    rows = _rows(tokens, num_chunks)
    flops, chunk_bytes = 2.0 * rows * D * V, rows * V * work.element_bytes
    sum_bytes = 4 * V * D * (2 if num_chunks > 1 else 1)
    return num_chunks * [
        *work.product(flops, chunk_bytes),
        *work.pass_over(2 * chunk_bytes),
        *work.product(flops, chunk_bytes),
        *work.product(flops, chunk_bytes + sum_bytes),
    ]


def _rows(total: int, num_chunks: int) -> float:
    if not 1 <= num_chunks <= total:
        raise InputError(f"{num_chunks} chunks of {total} rows, needed is 1 to {total}")
    return total / num_chunks
