"""Model FLOPs and their share of what the device could do (MFU)."""

from collections.abc import Sequence

import jax

from jaxchunk.models.qwen2 import Qwen2Config

# Dense 16-bit peak with fp32 accumulation, FLOP/s, from NVIDIA's data sheets. A device that is missing has MFU null.
PEAK_FLOPS_16_BIT = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA GeForce RTX 5090": 210e12,
}


# Memory bandwidth, bytes/s, from the same. What a copy reaches is some 10% less.
BANDWIDTH = {
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
}


def training_flops_per_token(config: Qwen2Config, seq_len: int, *, frozen: bool = False) -> float:
    """FLOPs of forward and backward for one token: 6 per weight that multiplies it, LM head included, plus attention.

    4 per weight where weights are `frozen`, the adapters beside them not counted. Causal attention is counted once (S/2
    keys a query on average): 6 * L * S * D, in packed rows too, where it is less. Recomputation does not count.
    """
    D, F = config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    block = 2 * D * D + 2 * D * key_value + 3 * D * F
    matmuls = config.num_hidden_layers * block + config.vocab_size * D
    return (4.0 if frozen else 6.0) * matmuls + 6.0 * config.num_hidden_layers * seq_len * D


def peak_flops(devices: Sequence[jax.Device], compute_dtype: str) -> float | None:
    """The devices' peak together for a 16-bit compute dtype; None where a full name is not in the table."""
    peaks = [PEAK_FLOPS_16_BIT.get(device.device_kind) for device in devices]
    known = [peak for peak in peaks if peak is not None]
    return sum(known) if compute_dtype == "bfloat16" and len(known) == len(peaks) else None
