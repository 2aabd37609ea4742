"""The prefill benchmark: latency, energy and power of prompts of several lengths, each in several chunk counts.

The paper measured chunked prefill through vLLM (sec. 3.3, figure 5), with its scheduler and paged cache in between.
Here nothing but the number of chunks differs between two variants of a length.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxchunk import device_memory, plotting
from jaxchunk.bench import prefill_peer
from jaxchunk.bench.prefill_config import PrefillBenchConfig, check_positions, named, protocol_of, validate
from jaxchunk.bench.prefill_summary import sentences, summarize, table
from jaxchunk.errors import InputError
from jaxchunk.inference import prefill, unstack_layers
from jaxchunk.inference.prefill import lower_layers
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.models import hf, qwen2
from jaxchunk.models.attention import choose_attention
from jaxchunk.models.qwen2 import Execution, Params, Qwen2Config
from jaxchunk.run_dir import RunDirectory
from jaxchunk.words import chunks_in_words

_logger = logging.getLogger("jaxchunk")
_COMPILING_THREADS = 8


def run(config: PrefillBenchConfig) -> None:
    """Measures, and writes records, summary, table and figure into the run's directory as it goes.

    Raises:
      InputError: a flag is out of its domain, the model or the directory cannot be used, or nothing fits in memory.
      KeyboardInterrupt: it was interrupted; what was measured is kept and reported on.
    """
    validate(config)
    checkpoint = None if config.hf_model is None else hf.locate(config.hf_model)
    model = qwen2.SIZES[config.model] if checkpoint is None else hf.load_config(checkpoint)
    check_positions(config, model)
    execution = _execution(config, model)

    def variants() -> list[Variant]:
        found = list(compile_variants(config, model, checkpoint, execution))
        if not found:
            raise InputError("nothing fits in the device's memory; use a smaller --model or shorter --seq_lens")
        return found

    def report(directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
        rows = summarize(measurements)
        directory.write_json("summary.json", rows)
        page = [table(rows), *sentences(measurements, rows)]
        (directory.path / "table.md").write_text("\n\n".join(page) + "\n")
        if figure := plotting.plot_prefill(directory.path):
            page.append(f"figure: {figure}")
        return "\n".join(page)

    harness.run(Benchmark("prefill", config, protocol_of(config), variants, report))


def compile_variants(
    config: PrefillBenchConfig, model: Qwen2Config, checkpoint: Path | None, execution: Execution
) -> Iterator[Variant]:
    """Loads the model and compiles every variant, then the peer's; what does not fit is left out with a word."""
    params = _params(config, model, checkpoint)
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    print(
        f"{jax.devices()[0].device_kind}: {named(config)}, {weight_bytes / 1e9:.2f} GB of {config.dtype} weights, "
        f"{config.batch_size} x {' '.join(map(str, config.seq_lens))} tokens, attention {execution.attention}; "
        "compiling ...",
        flush=True,
    )
    prompts = {
        seq_len: jax.random.randint(jax.random.key(config.seed), (config.batch_size, seq_len), 0, model.vocab_size)
        for seq_len in config.seq_lens
    }
    for seq_len, token_ids in prompts.items():
        for num_chunks in config.chunks:
            name = f"{seq_len} tokens, {chunks_in_words(num_chunks)}"
            obstacle = _compile(model, params, (config.batch_size, seq_len), execution, num_chunks, weight_bytes)
            if obstacle is None:
                call = _Call(model, params, token_ids, execution, num_chunks)
                yield Variant(name, call, factors=_factors(config, seq_len, num_chunks))
            else:
                _logger.warning("%s is left out: %s", name, obstacle)
    if config.peers:
        peer = prefill_peer.load(model, checkpoint, config.dtype, config.seed)
        for seq_len, token_ids in prompts.items():
            name, factors = f"{seq_len} tokens, {peer.name}", _factors(config, seq_len, 1, peer.name)
            yield Variant(name, peer.prefill_of(token_ids), factors=factors)


def _factors(config: PrefillBenchConfig, seq_len: int, chunks: int, peer: str | None = None) -> dict[str, Any]:
    return {"batch_size": config.batch_size, "seq_len": seq_len, "chunks": chunks, "peer": peer}


@dataclasses.dataclass(frozen=True)
class _Call:
    """One prefill; the logits are small enough to be watched, and the cache goes as soon as it is done."""

    model: Qwen2Config
    params: Params
    token_ids: jax.Array
    execution: Execution
    num_chunks: int

    def __call__(self) -> jax.Array:
        logits, _ = prefill(
            self.model, self.params, self.token_ids, execution=self.execution, num_chunks=self.num_chunks
        )
        return logits


def _compile(
    model: Qwen2Config,
    params: Params,
    shape: tuple[int, int],
    execution: Execution,
    num_chunks: int,
    weight_bytes: int,
) -> str | None:
    """Compiles the programs of a variant, several at a time; says why it does not fit, where it does not."""
    lowered = lower_layers(model, params, shape, execution=execution, num_chunks=num_chunks)
    try:
        with ThreadPoolExecutor(_COMPILING_THREADS) as pool:
            programs = list(pool.map(lambda program: program.compile(), lowered))
    except jax.errors.JaxRuntimeError as error:
        if not device_memory.is_out_of_memory(error):
            raise
        return device_memory.COMPILER_WITHOUT_MEMORY
    heads = 2 * model.num_hidden_layers * model.num_key_value_heads
    cache_bytes = shape[0] * shape[1] * heads * model.head_dim * jnp.dtype(execution.compute_dtype).itemsize
    temporary_bytes = max(_temporary_bytes(program) for program in programs)
    needed = weight_bytes + 2 * cache_bytes + temporary_bytes  # the layers' caches, and all of them in one
    limit = device_memory.limit_bytes(jax.devices()[0])
    if limit is not None and needed > device_memory.usable(limit):
        return f"it needs {needed / 1e9:.2f} of {limit / 1e9:.1f} GB"
    return None


def _temporary_bytes(program: jax.stages.Compiled) -> int:
    analysis = program.memory_analysis()
    assert analysis is not None, "CPU and GPU back ends have this analysis"
    return int(analysis.temp_size_in_bytes)


def _params(config: PrefillBenchConfig, model: Qwen2Config, checkpoint: Path | None) -> Params:
    dtype: Any = jnp.dtype(config.dtype)
    if checkpoint is not None:
        return unstack_layers(hf.load(checkpoint, dtype)[1], dtype)
    return _random_params(model, jax.random.key(config.seed), dtype)


def _random_params(model: Qwen2Config, key: jax.Array, dtype: Any) -> Params:
    """As from `qwen2.init`, a layer at a time: a stack of them would be there a second time for a while."""
    keys = jax.random.split(key, model.num_hidden_layers + 1)
    one_layer = dataclasses.replace(model, num_hidden_layers=1)

    @jax.jit
    def layer(key: jax.Array) -> Params:
        return unstack_layers(qwen2.init(one_layer, key, dtype), dtype)["layers"][0]

    @jax.jit
    def others(key: jax.Array) -> Params:
        return {name: leaf for name, leaf in qwen2.init(one_layer, key, dtype).items() if name != "layers"}

    return others(keys[0]) | {"layers": tuple(layer(key) for key in keys[1:])}


def _execution(config: PrefillBenchConfig, model: Qwen2Config) -> Execution:
    try:
        attention, reason = choose_attention(model, max(config.seq_lens), config.dtype, config.attention)
    except ValueError as error:
        raise InputError(f"--attention: {error}") from None
    _logger.info("attention: %s (%s)", attention, reason)
    return Execution(compute_dtype=jnp.dtype(config.dtype), attention=attention)
