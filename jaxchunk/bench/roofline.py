"""What a training step must compute and move, part by part, and how long that takes at a device's rates.

Counted for a step that keeps all activations (no remat). FLOPs are those of GEMMs and of attention; element-wise
arithmetic is not counted, since memory limits it. Bytes are those of operands and results that pass through memory
where neighbours that can be fused are fused: a lower bound, which a compiler may miss.

Letters as in `models/qwen2.py`; T tokens of a step.
"""

import dataclasses

from jaxchunk.models.qwen2 import Qwen2Config, num_params

# In the order of the table; the model and the step name their parts so (`jax.named_scope`).
COMPONENTS = ("embedding", "norm", "attention", "rope", "attention_core", "mlp", "lm_head", "weights_cast", "optimizer")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one part of a step.

    Attributes:
      component: one of `COMPONENTS`.
      flops: of matrix products.
      gemm_bytes: that these read and write.
      elementwise_bytes: that everything else reads and writes.
    """

    component: str
    flops: float
    gemm_bytes: float
    elementwise_bytes: float


@dataclasses.dataclass(frozen=True)
class Rates:
    """Of a device: FLOP/s of matrix products, and bytes/s of memory."""

    flops: float
    bandwidth: float

    def seconds(self, cost: Cost) -> float:
        """The least time of a part: its products bound by one rate or the other, then everything else."""
        return max(cost.flops / self.flops, cost.gemm_bytes / self.bandwidth) + cost.elementwise_bytes / self.bandwidth


def step_costs(
    model: Qwen2Config, *, tokens: int, seq_len: int, micro_batches: int, lmhead_chunks: int, itemsize: int
) -> list[Cost]:
    """The parts of a step, in the order of `COMPONENTS`.

    Args:
      model: the architecture.
      tokens: T.
      seq_len: S.
      micro_batches: that the step is done in.
      lmhead_chunks: of the LM head in each.
      itemsize: bytes of an activation; parameters, gradients and moments are float32.
    """
    T, S, L = tokens, seq_len, model.num_hidden_layers
    D, F, V, P = model.hidden_size, model.intermediate_size, model.vocab_size, num_params(model)
    KV = model.num_key_value_heads * model.head_dim

    def gemms(*shapes: tuple[int, int]) -> tuple[float, float]:
        """FLOPs and bytes of [T, a] x [a, b] and of both its gradients, in all layers."""
        flops = L * sum(6.0 * T * a * b for a, b in shapes)
        return flops, L * sum(3.0 * itemsize * (T * (a + b) + a * b * micro_batches) for a, b in shapes)

    # Chunks add up dW in float32: each but the first reads it again.
    dw_bytes = 4.0 * V * D * (2 * lmhead_chunks * micro_batches - 1)
    costs = {
        # Rows of the float32 table; their gradient is added to a table of zeros.
        "embedding": Cost("embedding", 0.0, 0.0, T * D * (4 + itemsize) + T * D * (itemsize + 8) + 4.0 * V * D),
        # With the residual sum: forward (x, delta -> x, y), backward (x, dy, dx -> dx).
        "norm": Cost("norm", 0.0, 0.0, float(itemsize * T * D * (2 * L * 8 + 5))),
        "attention": Cost("attention", *gemms((D, D), (D, KV), (D, KV), (D, D)), 0.0),
        "rope": Cost("rope", 0.0, 0.0, 4.0 * L * itemsize * T * (D + KV)),
        # Causal: half of 4 T S D forward; 5/2 of that backward, which computes the scores again.
        "attention_core": Cost(
            "attention_core", 7.0 * L * T * S * D, L * itemsize * T * (2.0 * D + 2 * KV + 4 * D + 4 * KV), 0.0
        ),
        # silu(gate) * up: forward reads 2 F and writes F, backward reads 3 F and writes 2 F.
        "mlp": Cost("mlp", *gemms((D, F), (D, F), (F, D)), 8.0 * L * itemsize * T * F),
        # One array of exponentials or logits, written once and read twice, by GEMMs.
        "lm_head": Cost("lm_head", 6.0 * T * D * V, 3.0 * itemsize * T * V + dw_bytes, 0.0),
        # To the compute dtype, once a micro-batch, and their gradients back.
        "weights_cast": Cost(
            "weights_cast", 0.0, 0.0, 0.0 if itemsize == 4 else 2.0 * micro_batches * (4 + itemsize) * (P - V * D)
        ),
        # AdamW reads and writes 12 bytes a parameter and reads the gradient, once more for its norm; micro-batches sum.
        "optimizer": Cost("optimizer", 0.0, 0.0, P * (24.0 + 8.0 + 12.0 * (micro_batches - 1))),
    }
    return [costs[name] for name in COMPONENTS]
