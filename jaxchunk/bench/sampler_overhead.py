"""What reading the telemetry costs: the microbenchmark with the sampler on and off, interleaved."""

import dataclasses
from collections.abc import Sequence

from jaxchunk.bench import microbench, microbench_config
from jaxchunk.bench.microbench_config import MicrobenchConfig
from jaxchunk.measuring import harness
from jaxchunk.measuring.harness import Benchmark
from jaxchunk.measuring.protocol import Measurement, Variant
from jaxchunk.measuring.statistics import bootstrap_median, interval_of, ratios
from jaxchunk.run_dir import RunDirectory

ON, OFF = "sampler on", "sampler off"


def run(config: MicrobenchConfig) -> None:
    """Measures one chunk count and kind of inputs of the microbenchmark twice: read, and not read.

    Args:
      config: of the microbenchmark; the first of its chunk counts, inputs and softmaxes is used.

    Raises:
      InputError: a flag is out of its domain, the directory cannot be used, or nothing fits in memory.
    """
    microbench_config.validate(config)
    config = dataclasses.replace(
        config, chunks=config.chunks[:1], inputs=config.inputs[:1], softmax=config.softmax[:1], timeline=False
    )

    def variants() -> list[Variant]:
        (variant,) = microbench.Programs(config).variants()
        return [dataclasses.replace(variant, name=name, watched=name == ON) for name in (ON, OFF)]

    harness.run(Benchmark("sampler-overhead", config, microbench_config.protocol_of(config), variants, _report))


def _report(directory: RunDirectory, measurements: Sequence[Measurement]) -> str:
    relative = ratios(measurements, ON, OFF)
    ratio = bootstrap_median(relative) if relative else None
    share = interval_of(measurements, ON, "sampler_cpu_share")
    found = {"time_on_over_off": ratio, "sampler_cpu_share": share}
    summary = {name: None if value is None else value._asdict() for name, value in found.items()}
    directory.write_json("summary.json", summary)
    if ratio is None:
        return "no repeat has both"
    lines = [
        f"time with the sampler on, over off: {ratio.median:.4f} ({ratio.low:.4f} to {ratio.high:.4f}), median of "
        f"{len(relative)} interleaved repeats"
    ]
    if share is not None:
        lines.append(f"the sampler took {share.median:.2%} of one core ({share.low:.2%} to {share.high:.2%})")
    return "\n".join(lines)
