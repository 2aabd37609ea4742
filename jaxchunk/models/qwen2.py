"""Qwen2: the whole model, as functions on a pytree of parameters.

A decoder of pre-norm blocks with grouped-query attention (biases on q, k and v only), rotary positions and SwiGLU
("Qwen2 Technical Report", arXiv:2407.10671). Qwen2.5 is the same; Llama 3 ("The Llama 3 Herd of Models",
arXiv:2407.21783) is the same without the biases (`attention_bias=False`), from 3.1 on with stretched rotary frequencies
(`rope_scaling`). The parameters of all blocks are stacked along a leading axis; the blocks
are unrolled when compiled, because a compiled loop sends every saved activation through a stacked copy in memory
(40% of the step time on an H200). `scan_layers` buys compile time back at that price.

Letters: B sequences, S positions, D model width, N query heads, K key/value heads, H head width, F feed-forward width,
V vocabulary, L layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int, PRNGKeyArray

from jaxchunk.interleaving import interleave
from jaxchunk.lm_head.varying import varying_alike
from jaxchunk.models import partition, rope
from jaxchunk.models.rope import Llama3Rope

Params = dict[str, Any]
AttentionImplementation = Literal["cudnn", "xla"]
Elementwise = Literal["xla", "pallas", "pallas_interpret"]
Remat = Literal["none", "gated", "dots", "full"]
Attend = Callable[[Array, Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Architecture of a Qwen2 or Llama 3 model; the names are those of Hugging Face's `config.json` where it has one.

    Attributes:
      vocab_size: V.
      hidden_size: D.
      num_hidden_layers: L.
      num_attention_heads: N; D must be a multiple of it.
      num_key_value_heads: K; N must be a multiple of it.
      intermediate_size: F.
      tie_word_embeddings: whether the LM head is the embedding matrix.
      rope_theta: base of the rotary frequencies.
      rms_norm_eps: added to the mean square in every RMSNorm.
      max_position_embeddings: longest sequence the model is meant for.
      initializer_range: standard deviation of the initial weights.
      attention_bias: whether q, k and v have biases: Qwen2 has them, Llama has none.
      rope_scaling: the stretching of the rotary frequencies; None for none.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    intermediate_size: int
    tie_word_embeddings: bool
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    attention_bias: bool = True
    rope_scaling: Llama3Rope | None = None

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads are no multiple of {self.num_key_value_heads} key/value heads"
            )

    @property
    def head_dim(self) -> int:
        """H."""
        return self.hidden_size // self.num_attention_heads


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run, as opposed to what it is.

    Attributes:
      compute_dtype: dtype of activations and GEMM operands; norms and softmax are float32 regardless.
      attention: "cudnn" (flash attention; NVIDIA GPU, 16-bit dtypes) or "xla".
      elementwise: norms and SwiGLU of the blocks as Pallas kernels ("pallas", on a GPU; "pallas_interpret" for tests)
        or as XLA compiles them ("xla").
      remat: what the backward pass recomputes in a block: "none"; "gated", the product of gate and up; "dots",
        everything but GEMM outputs; "full", everything.
      scan_layers: compile one block and loop over it, instead of all blocks.
      mlp_chunks: chunks of tokens in which each block's MLP runs (`interleave`), 1 for none. This, `elementwise` and
        `remat` are for `hidden_states`: `jaxchunk.inference` keeps nothing for a backward pass and takes no notice.
      sharded: whether this is inside of a `jax.shard_map` over the axes of `partition`, with parameters as its rules
        shard them.
    """

    compute_dtype: DTypeLike = jnp.bfloat16
    attention: AttentionImplementation = "xla"
    elementwise: Elementwise = "xla"
    remat: Remat = "none"
    scan_layers: bool = False
    sharded: bool = False
    mlp_chunks: int = 1

    def __post_init__(self) -> None:
        if self.remat not in get_args(Remat):
            raise ValueError(f"remat is {self.remat!r}; it must be one of {', '.join(get_args(Remat))}")


SIZES = {
    "tiny": Qwen2Config(4096, 128, 4, 4, 2, 384, tie_word_embeddings=True),
    "qwen2-0.5b": Qwen2Config(151936, 896, 24, 14, 2, 4864, tie_word_embeddings=True),
    "qwen2-1.5b": Qwen2Config(151936, 1536, 28, 12, 2, 8960, tie_word_embeddings=True),
    "qwen2-7b": Qwen2Config(152064, 3584, 28, 28, 4, 18944, tie_word_embeddings=False),
    # Llama 3.1: the shapes of Llama 3, with positions for 131072 tokens.
    "llama3-8b": Qwen2Config(
        *(128256, 4096, 32, 32, 8, 14336),
        tie_word_embeddings=False,
        rope_theta=5e5,
        rms_norm_eps=1e-5,
        max_position_embeddings=131072,
        attention_bias=False,
        rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 8192),
    ),
}


def init(config: Qwen2Config, key: PRNGKeyArray, dtype: DTypeLike = jnp.float32) -> Params:
    """Random parameters as Hugging Face initialises them: normal weights, zero biases, unit norms."""
    shapes = param_shapes(config, dtype)
    keys = jax.random.split(key, len(jax.tree.leaves(shapes)))
    key_of = dict(zip([path for path, _ in jax.tree.leaves_with_path(shapes)], keys, strict=True))

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> Array:
        name = path[-1].key
        if name.endswith("norm"):
            return jnp.ones(shape.shape, shape.dtype)
        if name.endswith("bias"):
            return jnp.zeros(shape.shape, shape.dtype)
        return config.initializer_range * jax.random.normal(key_of[path], shape.shape, shape.dtype)

    return jax.tree.map_with_path(leaf, shapes)


def param_shapes(config: Qwen2Config, dtype: DTypeLike = jnp.float32) -> Params:
    """Shapes and dtypes of the parameters; every weight maps its last-but-one dimension to its last."""
    D, F, V, L = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
    NH, KH = D, config.num_key_value_heads * config.head_dim
    layers: dict[str, tuple[int, ...]] = {
        "attention_norm": (L, D),
        "q_weight": (L, D, NH),
        "k_weight": (L, D, KH),
        "v_weight": (L, D, KH),
        "o_weight": (L, NH, D),
        "mlp_norm": (L, D),
        "gate_weight": (L, D, F),
        "up_weight": (L, D, F),
        "down_weight": (L, F, D),
    }
    if config.attention_bias:
        layers |= {"q_bias": (L, NH), "k_bias": (L, KH), "v_bias": (L, KH)}
    shapes: Params = {"embedding": (V, D), "layers": layers, "final_norm": (D,)}
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (V, D)
    is_shape = lambda s: isinstance(s, tuple)  # noqa: E731
    return jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, dtype), shapes, is_leaf=is_shape)


def num_params(config: Qwen2Config) -> int:
    """Number of parameters; a tied LM head is counted once."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def with_whole_vocabulary(params: Params) -> Params:
    """Embedding and LM head gathered along D, inside of a `jax.shard_map`: once for all that uses them."""
    gathered = {n: partition.gather_vocabulary(params[n]) for n in ("embedding", "lm_head") if n in params}
    return params | gathered


def lm_head_weight(params: Params) -> Float[Array, "V D"]:
    """The LM head's weight, for `lm_head_loss`: the embedding where they are tied."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]


def logits(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    execution: Execution | None = None,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S V"]:
    """Logits of every position, in float32: for evaluation. Training goes through `hidden_states`."""
    execution = execution or Execution(compute_dtype=jnp.float32)
    return head_logits(params, hidden_states(config, params, token_ids, execution, segment_ids))


def head_logits(params: Params, hidden: Float[Array, "*batch D"]) -> Float[Array, "*batch V"]:
    """Logits of hidden states, in float32; the GEMM is in the dtype of `hidden`."""
    return _matmul(hidden, lm_head_weight(params).astype(hidden.dtype).T, jnp.float32)


def hidden_states(
    config: Qwen2Config,
    params: Params,
    token_ids: Int[Array, "B S"],
    execution: Execution,
    segment_ids: Int[Array, "B S"] | None = None,
) -> Float[Array, "B S D"]:
    """Final hidden states (after the last norm), in the compute dtype, under a causal mask.

    Args:
      config: the architecture.
      params: parameters as from `init`, in any float dtype; cast to the compute dtype once. Layers may hold adapters
        besides (`lora`). Sharded ones come `with_whole_vocabulary`.
      token_ids: ids in [0, V).
      execution: how to run it.
      segment_ids: where a row holds several sequences one after the other, the number of each token's: a token sees its
        own sequence only, whose positions begin at 0. The mask is an array [B, 1, S, S] then. cuDNN takes it as a bias
        of 2 bytes an element, reads it in every head, computes the blocks that it masks, needs an even S, and with JAX
        0.10 computes a gradient of it that nobody asks for. (Its layout for packed sequences is no public part of JAX.)
    """
    dtype, layers = execution.compute_dtype, params["layers"]
    rotation, mask = rope.rotation(config, jnp.arange(token_ids.shape[1])), None
    if segment_ids is not None:
        rotation = rope.rotation(config, segment_positions(segment_ids))
        mask = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]

    def attend(q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True, implementation=execution.attention)

    arrange = side_by_side if execution.elementwise != "xla" else lambda layer: layer
    add_up = partition.sum_over_model if execution.sharded else lambda part: part

    def block(x: Array, layer: Params) -> Array:
        if execution.sharded:
            layer = partition.gather_block(arrange(layer), jnp.dtype(dtype))
        how = execution.mlp_chunks, execution.elementwise, execution.remat
        return decoder_block(config, attend, rotation, x, layer, add_up, *how)

    if not execution.sharded:
        with jax.named_scope("weights_cast"):
            layers = arrange(cast_weights(layers, dtype))
    if execution.remat in ("dots", "full"):
        policy = jax.checkpoint_policies.dots_saveable if execution.remat == "dots" else None
        block = jax.checkpoint(block, policy=policy)
    elif execution.sharded and partition.in_use(partition.FSDP):
        block = jax.checkpoint(block, policy=partition.all_but_gathered)
    table = params["embedding"]
    with jax.named_scope("embedding"):
        x = (partition.embed(table, token_ids) if execution.sharded else table[token_ids]).astype(dtype)
    unroll = 1 if execution.scan_layers else config.num_hidden_layers
    x, _ = jax.lax.scan(lambda x, layer: (block(x, layer), None), x, layers, unroll=unroll)
    return rms_norm(x, params["final_norm"], config.rms_norm_eps)


def cast_weights(params: Params, dtype: DTypeLike) -> Params:
    """Parameters, or a part of them, in the compute dtype; norms stay as they are: they are applied in float32."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if path[-1].key.endswith("norm") else leaf.astype(dtype), params
    )


def side_by_side(layer: Params) -> Params:
    """Parameters of a block, or of all, with q, k and v in one matrix, and gate and up if `swiglu` can take them so.

    Not where there are adapters: those products stay apart, and the base is frozen, so that the others would be there
    twice.
    """
    if any("_lora_" in name for name in layer):
        return layer
    together = [("q", "k", "v")] + [("gate", "up")] * _kernels().can_gate(layer["gate_weight"].shape[-1])
    arranged = dict(layer)
    for names in together:
        for kind in ("weight", "bias"):
            if f"{names[0]}_{kind}" in layer:
                parts = [arranged.pop(f"{name}_{kind}") for name in names]
                arranged[f"{'_'.join(names)}_{kind}"] = jnp.concatenate(parts, axis=-1)
    return arranged


def segment_positions(segment_ids: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """The place of every token in its own sequence."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1]), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def decoder_block(
    config: Qwen2Config,
    attend: Attend,
    rotation: tuple[Array, Array],
    x: Float[Array, "B S D"],
    layer: Params,
    add_up: Callable[[Array], Array] = lambda part: part,
    mlp_chunks: int = 1,
    elementwise: Elementwise = "xla",
    remat: Remat = "none",
) -> Float[Array, "B S D"]:
    """One block on the residual stream `x`.

    Args:
      config: the architecture.
      attend: attention of queries [B, S, N, H] to keys and values [B, S, K, H], or to these and others that it knows.
      rotation: of the tokens' positions, as from `rope.rotation`.
      x: residual stream.
      layer: the block's parameters, in the compute dtype (`cast_weights`); for kernels `side_by_side`.
      add_up: what is done to each branch before it is added: the sum over devices that have a part of it each.
      mlp_chunks: chunks of tokens in which the MLP runs.
      elementwise: as in `Execution`.
      remat: "gated" or not; the others are the caller's.
    """

    def norm(x: Array, delta: Array | None, weight: Array) -> tuple[Array, Array]:
        if elementwise == "xla":
            x = x if delta is None else x + delta
            return x, rms_norm(x, weight, config.rms_norm_eps)
        with jax.named_scope("norm"):
            interpret = elementwise == "pallas_interpret"
            return _kernels().residual_norm(x, delta, weight, config.rms_norm_eps, interpret=interpret)

    x, normed = norm(x, None, layer["attention_norm"])
    attended = add_up(_attention(config, attend, rotation, normed, layer))
    x, normed = norm(x, attended, layer["mlp_norm"])
    return x + add_up(_mlp(normed, layer, mlp_chunks, elementwise, remat == "gated"))


@jax.named_scope("attention")
def _attention(
    config: Qwen2Config, attend: Attend, rotation: tuple[Array, Array], x: Float[Array, "B S D"], layer: Params
) -> Float[Array, "B S D"]:
    B, S, _ = x.shape
    if "q_k_v_weight" in layer:
        q, k, v = _split(_linear(x, layer, "q_k_v"), config.num_attention_heads, config.num_key_value_heads)
    else:
        q, k, v = (_linear(x, layer, name) for name in "qkv")
    q, k, v = (part.reshape(B, S, -1, config.head_dim) for part in (q, k, v))
    q, k = rope.rotate(q, rotation), rope.rotate(k, rotation)
    precision = "highest" if x.dtype.itemsize >= 4 else "default"  # no TF32 here either
    with jax.default_matmul_precision(precision), jax.named_scope("attention_core"):
        out = attend(q, k, v)
    return _linear(out.reshape(B, S, -1), layer, "o")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _split(q_k_v: Float[Array, "B S C"], num_heads: int, num_kv_heads: int) -> tuple[Array, Array, Array]:
    """Queries, keys and values out of one product; their gradients are put together once, for all that reads them."""
    C = q_k_v.shape[-1]
    per_kv = C * num_kv_heads // (num_heads + 2 * num_kv_heads)
    q, k, v = jnp.split(q_k_v, [C - 2 * per_kv, C - per_kv], axis=-1)
    return q, k, v


def _split_forward(q_k_v: Array, num_heads: int, num_kv_heads: int) -> tuple[tuple[Array, Array, Array], None]:
    return _split(q_k_v, num_heads, num_kv_heads), None


def _split_backward(num_heads: int, num_kv_heads: int, _: None, cotangents: tuple[Array, ...]) -> tuple[Array]:
    del num_heads, num_kv_heads
    # Without the barrier XLA makes a copy for each product that reads it.
    return (jax.lax.optimization_barrier(jnp.concatenate(cotangents, axis=-1)),)


_split.defvjp(_split_forward, _split_backward)


@jax.named_scope("mlp")
def _mlp(
    x: Float[Array, "B S D"], layer: Params, num_chunks: int, elementwise: Elementwise, is_gated_again: bool
) -> Float[Array, "B S D"]:
    is_one_product, interpret = "gate_up_weight" in layer, elementwise == "pallas_interpret"

    def products(x: Array, layer: Params) -> Array | tuple[Array, Array]:
        if is_one_product:
            return _matmul(x, layer["gate_up_weight"])
        return _linear(x, layer, "gate"), _linear(x, layer, "up")

    def gated(projected: Any, _: Params) -> Array:
        if is_one_product:
            return _kernels().swiglu(projected, interpret=interpret)
        gate, up = projected
        return jax.nn.silu(gate) * up

    def down(x: Array, layer: Params) -> Array:
        return _linear(x, layer, "down")

    def gated_down(projected: Any, layer: Params) -> Array:
        if is_one_product and "down_lora_a" not in layer:
            return _gated_linear(*varying_alike(projected, layer["down_weight"]), interpret)
        return down(jax.checkpoint(gated)(projected, {}), layer)

    stages = [products, gated_down] if is_gated_again else [products, gated, down]
    if num_chunks == 1:
        return functools.reduce(lambda result, stage: stage(result, layer), stages, x)
    weights = {name: leaf for name, leaf in layer.items() if name.startswith(("gate_", "up_", "down_"))}
    rows = x.reshape(1, -1, x.shape[-1])
    return interleave(stages, rows, weights, num_chunks=num_chunks, axis=1).reshape(x.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _gated_linear(gate_up: Float[Array, "B S 2F"], weight: Float[Array, "F D"], interpret: bool) -> Array:
    """`swiglu` and a product, of which only `gate_up` is kept: `swiglu_gradient` gives the gated product again."""
    return _matmul(_kernels().swiglu(gate_up, interpret=interpret), weight)


def _gated_linear_forward(gate_up: Array, weight: Array, interpret: bool) -> tuple[Array, tuple[Array, Array]]:
    return _gated_linear(gate_up, weight, interpret), (gate_up, weight)


def _gated_linear_backward(interpret: bool, kept: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    gate_up, weight = kept
    d_product = _matmul(cotangent, weight.T)
    d_gate_up, product = _kernels().swiglu_gradient(gate_up, d_product, interpret=interpret)
    rows, columns = (a.reshape(-1, a.shape[-1]) for a in (product, cotangent))
    return d_gate_up, _matmul(rows.T, columns)


_gated_linear.defvjp(_gated_linear_forward, _gated_linear_backward)


def _linear(x: Float[Array, "B S I"], layer: Params, name: str) -> Float[Array, "B S O"]:
    """A projection with its bias and its adapter, where it has them."""
    projected = _matmul(x, layer[f"{name}_weight"])
    if f"{name}_lora_a" in layer:
        projected += _matmul(_matmul(x, layer[f"{name}_lora_a"]), layer[f"{name}_lora_b"])
    if f"{name}_bias" in layer:
        projected += jnp.expand_dims(layer[f"{name}_bias"], (0, 1))
    return projected


@jax.named_scope("norm")
def rms_norm(x: Float[Array, "*batch D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "*batch D"]:
    """Root-mean-square norm (arXiv:1910.07467), computed in float32, returned in the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    broadcast = weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)
    return (x32 * scale * broadcast).astype(x.dtype)


def _matmul(x: Array, weight: Array, out_dtype: DTypeLike | None = None) -> Array:
    """GEMM over the last dimension; float32 operands are multiplied in float32, not TF32."""
    precision = jax.lax.Precision.HIGHEST if x.dtype.itemsize >= 4 else None
    return jnp.matmul(x, weight, precision=precision, preferred_element_type=out_dtype)


def _kernels() -> ModuleType:
    """`elementwise`, imported on demand: JAX does not come with Triton everywhere."""
    from jaxchunk.models import elementwise

    return elementwise
