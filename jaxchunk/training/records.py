"""What a run writes down: one record a step, a summary at the end, and the lines that people read."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from typing import Any, NamedTuple, Self

import numpy as np

from jaxchunk.telemetry import Samples, Window

WARMUP_STEPS = 5  # left out of medians where a run is long enough: caches, clocks and the input pipeline settle


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One line of `steps.jsonl`. None is "not known", never zero; `energy_null_reason` says why.

    `time_s` is the completion of the step on the run's clock (0 where telemetry starts). Joules and watts are the GPU's
    own, as NVML reports them, not the wall's. `throttle` holds seconds by clock-event reason. Where there are several
    GPUs, joules, watts and throttle seconds are sums over those of all processes, the clock is the mean and the
    temperature the highest; `devices` has each of them, by its place in the mesh. `lmhead_chunks` is the count that the
    step ran with.
    """

    step: int
    time_s: float
    loss: float
    grad_norm: float
    lr: float
    step_time_s: float
    tokens_per_s: float
    mfu: float | None
    energy_j: float | None
    energy_bound_j: float | None
    energy_per_token_j: float | None
    energy_source: str | None
    energy_null_reason: str | None
    power_w: float | None
    sm_clock_mhz: float | None
    temperature_c: float | None
    throttle: dict[str, float] | None
    devices: dict[str, dict[str, Any]] | None = None
    lmhead_chunks: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """From a line of `steps.jsonl`, where NaN and infinities became null."""
        metrics = {name: math.nan for name in ("loss", "grad_norm", "lr") if record[name] is None}
        return cls(**record | metrics)

    @property
    def num_devices(self) -> int:
        """How many GPUs joules, watts and throttle seconds are sums over."""
        return max(1, len(self.devices or ()))

    def line(self, total_steps: int) -> str:
        """One line for people; what is throttled is a share of the time, of several GPUs the mean of theirs."""
        device_s = self.step_time_s * self.num_devices
        throttled = {reason: s / device_s for reason, s in (self.throttle or {}).items() if s > 0.01 * device_s}
        parts = [
            f"step {self.step:>{len(str(total_steps))}}/{total_steps}",
            f"loss {self.loss:.4f}",
            f"grad norm {self.grad_norm:.3f}",
            f"lr {self.lr:.2e}",
            f"{self.step_time_s * 1e3:.0f} ms",
            f"{self.tokens_per_s:,.0f} tokens/s",
            None if self.mfu is None else f"MFU {self.mfu:.1%}",
            None if self.power_w is None else f"{self.power_w:.0f} W",
            None if self.energy_per_token_j is None else f"{self.energy_per_token_j * 1e3:.3g} mJ/token",
            None if self.sm_clock_mhz is None else f"{self.sm_clock_mhz:.0f} MHz",
            None if self.temperature_c is None else f"{self.temperature_c:.0f} C",
            *(f"{reason} {share:.0%}" for reason, share in throttled.items()),
        ]
        return "  ".join(part for part in parts if part)


def step_record(
    step: int,
    metrics: dict[str, float],
    window: Window,
    *,
    clock_zero_s: float,
    tokens: int,
    flops_per_token: float,
    peak_flops: float | None,
    lmhead_chunks: int,
) -> StepRecord:
    """The record of a step whose window of time is `window`."""
    seconds = window.end_s - window.start_s
    return StepRecord(
        step=step,
        time_s=window.end_s - clock_zero_s,
        step_time_s=seconds,
        tokens_per_s=tokens / seconds,
        mfu=None if peak_flops is None else tokens / seconds * flops_per_token / peak_flops,
        energy_j=window.energy_j,
        energy_bound_j=window.energy_bound_j,
        energy_per_token_j=None if window.energy_j is None else window.energy_j / tokens,
        energy_source=window.energy_source,
        energy_null_reason=window.energy_null_reason,
        power_w=window.power_w,
        sm_clock_mhz=window.sm_clock_mhz,
        temperature_c=window.temperature_c,
        throttle=window.throttle,
        devices=_each_device(window),
        lmhead_chunks=lmhead_chunks,
        **metrics,
    )


def perplexity(loss: float) -> float:
    """That of a mean loss in nats: e to the loss. Infinite where no float holds it."""
    return math.inf if loss > 700 else math.exp(loss)


def _each_device(window: Window) -> dict[str, dict[str, Any]] | None:
    """What is known of each of several devices."""
    names = ("energy_j", "energy_bound_j", "energy_null_reason", "power_w", "sm_clock_mhz", "temperature_c", "throttle")
    return {
        str(place): {name: getattr(part, name) for name in names} for place, part in enumerate(window.parts)
    } or None


class Spread(NamedTuple):
    """What samples of one quantity came to: how many, mean, standard deviation."""

    samples: int
    mean: float
    std: float


@dataclasses.dataclass(frozen=True)
class Stretch:
    """One line of `stretches.jsonl`: steps one after the other, with no validation and no checkpoint between them.

    All stretches of a run cover its steps and nothing but steps. They are long, so their energy is known more closely
    than the steps'. Times are of the run's clock; `power_w` and `sm_clock_mhz` leave the first steps of a process out.
    Of several GPUs there is no `power_w`, samples being taken of each at times of its own, and `sm_clock_mhz` is the
    first one's; `devices` is as in `StepRecord`.
    """

    first_step: int
    last_step: int
    start_s: float
    end_s: float
    energy_j: float | None
    energy_bound_j: float | None
    energy_source: str | None
    energy_null_reason: str | None
    second_energy_j: float | None
    throttle: dict[str, float] | None
    slow_without_reason_s: float | None
    rails_j: dict[str, float] | None
    power_w: Spread | None
    sm_clock_mhz: Spread | None
    devices: dict[str, dict[str, Any]] | None = None

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """From a line of `stretches.jsonl`."""
        spreads = {name: Spread(*record[name]) for name in ("power_w", "sm_clock_mhz") if record[name] is not None}
        return cls(**record | spreads)


def stretch_record(
    first_step: int, last_step: int, window: Window, samples: Samples, *, clock_zero_s: float
) -> Stretch:
    """The record of a stretch whose window of time is `window`, with raw samples of its steady part."""
    return Stretch(
        first_step=first_step,
        last_step=last_step,
        start_s=window.start_s - clock_zero_s,
        end_s=window.end_s - clock_zero_s,
        energy_j=window.energy_j,
        energy_bound_j=window.energy_bound_j,
        energy_source=window.energy_source,
        energy_null_reason=window.energy_null_reason,
        second_energy_j=None if window.cross_check is None else window.cross_check.energy_j,
        throttle=window.throttle,
        slow_without_reason_s=window.slow_without_reason_s,
        rails_j=window.rails_j,
        power_w=None if window.parts else _spread(samples.power_w),
        sm_clock_mhz=_spread(samples.sm_clock_mhz),
        devices=_each_device(window),
    )


def summarize(records: list[StepRecord], stretches: list[Stretch], tokens: int) -> dict[str, Any]:
    """Medians over the steps after the first few, and totals over the stretches of uninterrupted training.

    Of several GPUs, whose samples are not taken at the same times, the mean power is that of the steps.

    Args:
      records: all steps, those before a resumption too.
      stretches: which together cover all steps.
      tokens: tokens in a step.
    """
    steady = records[WARMUP_STEPS:] if len(records) > 2 * WARMUP_STEPS else records
    if not steady:
        return {"steps": 0}
    seconds = [record.step_time_s for record in steady]
    power_w = _pooled(stretch.power_w for stretch in stretches)
    sm_clock_mhz = _pooled(stretch.sm_clock_mhz for stretch in stretches)
    training_s = sum(stretch.end_s - stretch.start_s for stretch in stretches)
    return {
        "steps": len(records),
        "final_train_loss": statistics.fmean(record.loss for record in records[-10:]),
        "step_time_s_median": statistics.median(seconds),
        "step_time_s_p10_p90": [float(q) for q in np.percentile(seconds, [10, 90])],
        "tokens_per_s_median": tokens / statistics.median(seconds),
        "mfu_median": _median(record.mfu for record in steady),
        "training_time_s": training_s,
        **_energy_totals(stretches, tokens * len(records)),
        "power_w_mean": mean_of(record.power_w for record in steady) if power_w is None else power_w.mean,
        "power_w_std": None if power_w is None else power_w.std,
        "sm_clock_mhz_mean": None if sm_clock_mhz is None else sm_clock_mhz.mean,
        "sm_clock_mhz_std": None if sm_clock_mhz is None else sm_clock_mhz.std,
        "temperature_c_max": max((r.temperature_c for r in records if r.temperature_c is not None), default=None),
        "throttle_s": totals(stretch.throttle for stretch in stretches),
        "slow_without_reason_s": _total(stretch.slow_without_reason_s for stretch in stretches),
        "energy_sources_disagree": _disagreement(stretches),
        "rails_j": totals(stretch.rails_j for stretch in stretches),
    }


def mean_of(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _energy_totals(stretches: list[Stretch], tokens: int) -> dict[str, Any]:
    missing = next((stretch.energy_null_reason for stretch in stretches if stretch.energy_j is None), None)
    if missing is not None or not stretches:
        nothing = dict.fromkeys(("energy_j", "energy_bound_j", "energy_per_token_j", "energy_source"))
        return nothing | {"energy_null_reason": missing or "no step was completed"}
    energy_j = sum(stretch.energy_j for stretch in stretches if stretch.energy_j is not None)
    return {
        "energy_j": energy_j,
        "energy_bound_j": sum(stretch.energy_bound_j or 0.0 for stretch in stretches),
        "energy_per_token_j": energy_j / tokens,
        "energy_source": stretches[0].energy_source,
        "energy_null_reason": None,
    }


def totals(parts: Iterable[dict[str, float] | None]) -> dict[str, float] | None:
    """Sums by key, over the parts that are known; None where no part is."""
    sums: dict[str, float] = {}
    for part in parts:
        for name, value in (part or {}).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums or None


def _total(parts: Iterable[float | None]) -> float | None:
    """The sum; None where a part is unknown, for the others alone would be too little."""
    values = list(parts)
    known = [value for value in values if value is not None]
    return sum(known) if known and len(known) == len(values) else None


def _disagreement(stretches: list[Stretch]) -> float | None:
    """(second energy source - first) / first, over the stretches that have both."""
    pairs = [(s.second_energy_j, s.energy_j) for s in stretches if s.second_energy_j is not None]
    first_j = sum(first for _, first in pairs if first is not None)
    return sum(second for second, _ in pairs) / first_j - 1 if first_j else None


def _spread(values: np.ndarray) -> Spread | None:
    values = values[np.isfinite(values)]
    return Spread(int(values.size), float(values.mean()), float(values.std())) if values.size else None


def _pooled(parts: Iterable[Spread | None]) -> Spread | None:
    """The spread of all samples together."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    counts, means, stds = map(np.array, zip(*known, strict=True))
    mean = np.average(means, weights=counts)
    return Spread(
        int(counts.sum()), float(mean), float(np.sqrt(np.average(stds**2 + (means - mean) ** 2, weights=counts)))
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
