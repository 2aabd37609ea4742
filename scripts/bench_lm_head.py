"""Times forward and backward of the LM head, every implementation interleaved with the three bare GEMMs.

`python scripts/bench_lm_head.py` takes the paper's training shape on a GPU and the tiny model's on a CPU.
"""

import dataclasses
import datetime
import logging
import os
from pathlib import Path

import jax
import tyro
from tqdm import tqdm

from jaxchunk import device_memory, environment, plotting
from jaxchunk.bench import lm_head, protocol
from jaxchunk.errors import exit_on_input_error
from jaxchunk.run_dir import RunDirectory
from jaxchunk.telemetry import open_monitor


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    device_memory.allocate_as_needed(os.environ)
    default = lm_head.default_config(jax.default_backend())
    config = tyro.cli(lm_head.LMHeadBenchConfig, default=default, description=__doc__, use_underscores=True)
    with exit_on_input_error():
        lm_head.validate(config)
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        run = RunDirectory(config.out_dir or Path("runs") / f"{stamp}-lm-head", overwrite=config.overwrite)
    device = jax.devices()[0]
    print(f"{device.device_kind}: T={config.tokens} D={config.width} V={config.vocab} {config.dtype}; compiling ...")
    programs = list(lm_head.compile_variants(config, device_memory.limit_bytes(device)))
    variants = [program.variant for program in programs]
    measurements = []
    with run, open_monitor(device, csv_path=run.path / "telemetry.csv") as monitor:
        run.write_json("config.json", dataclasses.asdict(config))
        run.write_json("env.json", environment.describe_environment(monitor.describe()))
        measuring = protocol.interleave(
            variants, monitor, repeats=config.repeats, window_s=config.window_s, seed=config.seed
        )
        for measurement in tqdm(measuring, total=len(variants) * config.repeats, unit="window", disable=None):
            run.append("records.jsonl", dataclasses.asdict(measurement))
            measurements.append(measurement)
        rows = lm_head.summarize(measurements, programs)
        run.write_json("summary.json", rows)
        (run.path / "table.md").write_text(lm_head.table(rows) + "\n")
    print(lm_head.table(rows))
    if (reason := rows[0]["energy_null_reason"]) is not None:
        print(f"energy null: {reason}")
    print(f"figure: {plotting.plot_lm_head(run.path)}")


if __name__ == "__main__":
    main()
