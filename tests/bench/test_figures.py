"""Figures of the microbenchmark: what is drawn is what was recorded."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxchunk.bench import figures
from jaxchunk.bench.figures import folding
from jaxchunk.bench.figures.microbench import draw_energy_time, draw_period, draw_throughput
from jaxchunk.bench.figures.microbench_run import read_microbench
from jaxchunk.bench.figures.power import draw_power
from jaxchunk.bench.figures.timeline import draw_timeline, one_iteration
from jaxchunk.bench.microbench_config import MicrobenchConfig
from jaxchunk.bench.timeline import KernelSpan, write_timeline
from jaxchunk.errors import InputError
from jaxchunk.measuring.protocol import Measurement
from jaxchunk.plotting.style import LabelledPoint, label_points, new_figure

# Made up, of the size of an H200's. Seconds a call at 1, 2, ... chunks.
TIMES_MS = {
    "random": {1: 58.5, 2: 58.1, 4: 57.5, 8: 58.1, 16: 59.1, 32: 64.1},
    "zero": {1: 51.3, 2: 51.5, 4: 48.3, 8: 48.4, 16: 48.7, 32: 55.3},
}
MEAN_W = {"random": 690.0, "zero": 520.0}
RIPPLE_W = 80.0  # amplitude at one chunk; it falls with the number of chunks
FLOPS = 4 * 32768 * 2048 * 131072
ALL = ["throughput.png", "power.png", "energy_time.png", "period.png", "timeline.png"]


def power_w(inputs, chunks, phase):
    """One period of ripple a chunk, and a level of its own for every kind of inputs."""
    return MEAN_W[inputs] + RIPPLE_W / chunks * np.sign(np.sin(2 * np.pi * chunks * phase))


def synthetic_measurement(rng, inputs, chunks, repeat, start_s, *, calls, scale=1.0, gpu=True):
    ends_s = np.cumsum(TIMES_MS[inputs][chunks] / 1e3 * scale * rng.normal(1 + rng.normal(0, 0.002), 0.003, calls))
    time_s = ends_s[-1] / calls
    energy_j = time_s * MEAN_W[inputs] * rng.normal(1, 0.004)
    reason = None if gpu else "JAX runs on cpu: no GPU to measure"
    return Measurement(
        variant=f"{inputs}, {chunks} chunk{'s' if chunks > 1 else ''}",
        repeat=repeat,
        calls=calls,
        time_s=float(time_s),
        energy_j=float(energy_j) if gpu else None,
        energy_bound_j=0.1 if gpu else None,
        energy_source="nvml_total_energy" if gpu else None,
        energy_null_reason=reason,
        power_w=float(energy_j / time_s) if gpu else None,
        power_w_std=RIPPLE_W / chunks if gpu else None,
        sm_clock_mhz=1580.0 if gpu else None,
        temperature_c=60.0 if gpu else None,
        throttle={"sw_power_cap": 1.0} if gpu else None,
        start_s=start_s,
        end_s=start_s + float(ends_s[-1]),
        call_ends_s=[round(float(end), 5) for end in ends_s],
        factors={"inputs": inputs, "chunks": chunks, "softmax": "pallas" if gpu else "xla"},
    )


def synthetic_samples(rng, measurements, *, hold_s=0.0):
    """Telemetry every 25 ms or so; with `hold_s` the device renews what it shows only so often."""
    for m in measurements:
        time_s = m.start_s
        shown_s = -math.inf
        while (time_s := time_s + rng.uniform(0.01, 0.04)) < m.end_s:
            if time_s - shown_s >= hold_s:
                shown_s = time_s
                phase = folding.phases(m, np.array([time_s]))[0]
                watts = power_w(m.factors["inputs"], m.factors["chunks"], phase) + rng.normal(0, 4)
                clock = 1580 - 15 * round((watts - MEAN_W[m.factors["inputs"]]) / 20)
                celsius = 60 + round(3 * math.sin(time_s))
            yield f"{time_s:.4f},{watts:.3f},{clock},{celsius},{time_s * 600:.3f}\n"


def synthetic_timeline(chunks, iteration_s, calls=3):
    """Every chunk: GEMM, softmax, GEMM; before the chunks the accumulator is set, between them a carry is copied."""
    spans, now_s = [], 0.0
    for _ in range(calls):
        spans.append(KernelSpan("Memset", "copy", now_s, 0.002 * iteration_s))
        now_s += 0.004 * iteration_s
        for _ in range(chunks):
            for kind, share in (("gemm", 0.35), ("softmax", 0.25), ("gemm", 0.3), ("other", 0.02), ("copy", 0.05)):
                duration_s = share * 0.99 * iteration_s / chunks
                spans.append(KernelSpan(f"{kind}_kernel", kind, now_s, duration_s * 0.98))
                now_s += duration_s
        now_s += 0.02 * iteration_s
    return spans


def synthetic_run(
    path: Path, *, gpu=True, hold_s=0.0, repeats=5, calls=40, chunks=(1, 2, 4, 8, 16, 32), kinds=tuple(TIMES_MS)
):
    rng = np.random.default_rng(0)
    path.mkdir(parents=True)
    softmax, device = ("pallas", "made-up GPU") if gpu else ("xla", "cpu")
    config = MicrobenchConfig(
        m=32768, k=2048, n=131072, chunks=chunks, inputs=kinds, softmax=(softmax,), dtype="bfloat16", repeats=repeats
    )
    (path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    (path / "env.json").write_text(json.dumps({"device_kind": device}))
    measurements, now_s = [], 5.0
    for repeat in range(repeats):
        for inputs in kinds:
            for count in chunks:
                scale = 1.0 if gpu else 1e4
                m = synthetic_measurement(rng, inputs, count, repeat, now_s, calls=calls, scale=scale, gpu=gpu)
                measurements.append(m)
                now_s = m.end_s + 1.0
    (path / "records.jsonl").write_text("".join(json.dumps(dataclasses.asdict(m)) + "\n" for m in measurements))
    if gpu:
        header = "time_s,power_w,sm_clock_mhz,temperature_c,total_energy_j\n"
        (path / "telemetry.csv").write_text(header + "".join(synthetic_samples(rng, measurements, hold_s=hold_s)))
        for label, count in (("1-chunk", 1), ("best", 4)):
            write_timeline(synthetic_timeline(count, TIMES_MS["random"][count] / 1e3), path / f"timeline-{label}.jsonl")
    return path


@pytest.fixture(scope="module")
def gpu_path(tmp_path_factory):
    return synthetic_run(tmp_path_factory.mktemp("gpu") / "run")


@pytest.fixture(scope="module")
def gpu_run(gpu_path):
    return read_microbench(gpu_path)


@pytest.fixture(scope="module")
def held_run(tmp_path_factory):
    path = tmp_path_factory.mktemp("held") / "run"
    return read_microbench(synthetic_run(path, hold_s=0.1, chunks=(1, 4), kinds=("random",)))


def drawn(draw, run):
    figure = new_figure(7, 4)
    assert draw(figure, run)
    figure.draw_without_rendering()
    return figure


def written(figure):
    texts = [text.get_text() for axis in figure.axes for text in axis.texts]
    return " ".join(" ".join([figure.get_suptitle(), figure.get_supxlabel(), *texts]).split())


def medians(run, quantity, inputs):
    """Medians over repeats by chunk count, from the records themselves."""
    values = {}
    for m in run.measurements:
        if m.factors["inputs"] == inputs:
            values.setdefault(m.factors["chunks"], []).append(quantity(m))
    return [float(np.median(values[count])) for count in sorted(values)]


def points(axis, label):
    """Medians of a series with error bars, and the ends of its vertical bars."""
    container = next(c for c in axis.containers if c.get_label() == label)
    ends = np.array([segment[:, 1] for segment in container.lines[2][-1].get_segments()])
    return *np.array(container.lines[0].get_xydata()).T, ends


def test_every_figure_is_drawn_and_named(gpu_path):
    paths = figures.plot_microbench(gpu_path)
    assert paths == [gpu_path / name for name in ALL]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


@pytest.mark.parametrize("draw", [draw_throughput, draw_power, draw_energy_time, draw_period, draw_timeline])
def test_nothing_is_clipped_and_nothing_is_small(draw, gpu_run, held_run):
    from matplotlib.text import Text

    long_name = dataclasses.replace(held_run, device="A Device With Quite a Long Name, Workstation Edition 96 GB")
    for run in (gpu_run, held_run, long_name):
        figure = drawn(draw, run)
        box = figure.get_tightbbox()
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.get_figwidth() and box.y1 <= figure.get_figheight()
        assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())
        assert run.device.split()[0] in figure.get_suptitle()
        assert "M=32768 K=2048 N=131072 bfloat16" in figure.get_suptitle().replace("\n", " ")


def test_throughput_is_that_of_the_records(gpu_run):
    left, right = drawn(draw_throughput, gpu_run).axes
    assert left.get_ylim()[0] == 0 and left.get_ylabel() == "GEMM throughput (TFLOP/s)"
    for inputs in ("random", "zero"):
        x, y, ends = points(left, f"{inputs} inputs")
        assert np.allclose(np.log2(x), [0, 1, 2, 3, 4, 5], atol=0.2)
        assert np.allclose(y, medians(gpu_run, lambda m: FLOPS / m.time_s / 1e12, inputs), rtol=1e-12)
        rows = gpu_run.series[inputs, "pallas"]
        assert np.allclose(ends, [[row.tflops.low, row.tflops.high] for row in rows])
        _, change, ends = points(right, f"{inputs} inputs")
        ones = {m.repeat: m.time_s for m in gpu_run.measurements if m.variant == f"{inputs}, 1 chunk"}
        assert np.allclose(change, medians(gpu_run, lambda m, o=ones: 100 * (o[m.repeat] / m.time_s - 1), inputs))
        assert (ends[:, 0] <= change).all() and (change <= ends[:, 1]).all() and (ends[1:, 0] < ends[1:, 1]).all()
    dots = np.concatenate([line.get_ydata() for line in left.lines if line.get_marker() == "."])
    assert np.allclose(sorted(dots), sorted(FLOPS / m.time_s / 1e12 for m in gpu_run.measurements))


def test_what_is_invalid_is_not_drawn(gpu_run):
    spoilt = [
        dataclasses.replace(m, time_s=m.time_s / 10, invalid_reason="no sample for 1.00 s") if m.repeat == 0 else m
        for m in gpu_run.measurements
    ]
    left, _ = drawn(draw_throughput, dataclasses.replace(gpu_run, measurements=spoilt)).axes
    dots = np.concatenate([line.get_ydata() for line in left.lines if line.get_marker() == "."])
    assert len(dots) == 4 * 12 and max(dots) < 1000
    assert len(folding.valid_windows(spoilt, "random, 1 chunk")) == 4


def test_energy_and_period_are_those_of_the_records(gpu_run):
    panels = drawn(draw_energy_time, gpu_run).axes
    assert [axis.get_title() for axis in panels] == ["random inputs", "zero inputs"]
    for axis, inputs in zip(panels, ("random", "zero"), strict=True):
        x, y, _ = points(axis, f"{inputs} inputs")
        assert np.allclose(x, medians(gpu_run, lambda m: m.time_s * 1e3, inputs))
        assert np.allclose(y, medians(gpu_run, lambda m: m.energy_j, inputs))
        labels = [text for text in axis.texts if " W" not in text.get_text()]
        assert [text.get_text() for text in labels] == ["1", "2", "4", "8", "16", "32"]
        assert [text.xy for text in labels] == list(zip(x, y, strict=True))
        powers = {text.get_text(): text.xy for text in axis.texts if " W" in text.get_text()}
        assert powers and all(math.isclose(y / x * 1e3, float(name[:-2])) for name, (x, y) in powers.items())
    axis = drawn(draw_period, gpu_run).axes[0]
    assert axis.get_xscale() == "log"
    for inputs in ("random", "zero"):
        x, y, ends = points(axis, f"{inputs} inputs")
        rows = gpu_run.series[inputs, "pallas"]
        assert np.allclose(x, [1e3 * row.time_s.median / row.chunks for row in rows])
        assert np.allclose(y, [1 / row.time_ratio.median for row in rows])
        assert np.allclose(ends, [[1 / row.time_ratio.high, 1 / row.time_ratio.low] for row in rows])


def test_no_energy_leaves_points_and_panels_out(gpu_run):
    unknown = [
        dataclasses.replace(row, energy_j=None) if row.inputs == "zero" or row.chunks == 2 else row
        for row in gpu_run.comparison.rows
    ]
    run = dataclasses.replace(gpu_run, comparison=dataclasses.replace(gpu_run.comparison, rows=unknown))
    (axis,) = drawn(draw_energy_time, run).axes
    assert len(points(axis, "random inputs")[0]) == 5


def test_folding_finds_the_ripple_of_the_iterations(gpu_run):
    for chunks in (1, 4):
        name = f"random, {chunks} chunk{'s' if chunks > 1 else ''}"
        windows = folding.valid_windows(gpu_run.measurements, name)
        folded = folding.fold(gpu_run.telemetry, windows, "power_w")
        time_s = gpu_run.telemetry["time_s"]
        assert folded.samples == sum(((time_s >= m.start_s) & (time_s <= m.end_s)).sum() for m in windows)
        assert folded.iterations == 5 * 40 and len(folded.phase) == 40
        # A bin that an edge of the square wave runs through has samples of both levels.
        inner = np.abs(folded.phase * 2 * chunks - np.round(folded.phase * 2 * chunks)) > 0.2
        assert inner.sum() > 20
        expected = power_w("random", chunks, folded.phase)
        assert np.abs(folded.median - expected)[inner].max() < 6
        assert ((folded.low <= folded.median) & (folded.median <= folded.high)).all()
        assert (folded.high - folded.low)[inner].max() < 30


def test_a_window_without_completion_times_is_not_folded(gpu_run):
    windows = [dataclasses.replace(m, call_ends_s=None) for m in gpu_run.measurements if m.variant == "zero, 2 chunks"]
    assert folding.fold(gpu_run.telemetry, windows, "power_w") is None
    single = dataclasses.replace(windows[0], calls=1)  # from its start to its end it is one iteration
    assert folding.fold(gpu_run.telemetry, [single], "power_w").iterations == 1
    run = dataclasses.replace(
        gpu_run, measurements=[dataclasses.replace(m, call_ends_s=None) for m in gpu_run.measurements]
    )
    assert "1 chunk: not folded" in written(drawn(draw_power, run))
    assert len(drawn(draw_timeline, run).axes) == 2


def test_the_phase_follows_the_completions():
    window = Measurement("v", 0, 2, 1.5, *[None] * 9, start_s=10.0, end_s=13.0, call_ends_s=[1.0, 3.0])
    assert np.allclose(folding.phases(window, np.array([10.0, 10.5, 11.0, 12.0, 13.0])), [0, 0.5, 0, 0.5, 1])


def test_the_band_is_from_10_to_90_percent():
    window = Measurement("v", 0, 1, 1.0, *[None] * 9, start_s=0.0, end_s=1.0)
    telemetry = {"time_s": np.linspace(0.01, 0.99, 11), "power_w": np.arange(11.0)}
    folded = folding.fold(telemetry, [window], "power_w")
    assert (folded.low, folded.median, folded.high) == (1.0, 5.0, 9.0)


def test_renewal_of_power(gpu_run, held_run):
    def seen(run):
        return folding.renewal(run.telemetry, folding.valid_windows(run.measurements, "random, 1 chunk"))

    slow, fast = seen(held_run), seen(gpu_run)
    assert 0.1 < slow.period_s < 0.13 and not slow.as_often_as_sampled
    assert 0.02 < fast.period_s < 0.03 and fast.as_often_as_sampled
    note = folding.resolution_note(slow, 0.0585)
    assert note == (
        f"NVML renews power every {slow.period_s * 1e3:.3g} ms; an iteration takes 58.5 ms: "
        "structure within an iteration is not resolved"
    )
    assert "is not known" in folding.resolution_note(fast, 0.0585)
    assert folding.resolution_note(slow, 4.01 * slow.period_s) is None
    assert folding.resolution_note(slow, 3.99 * slow.period_s) is not None
    assert folding.resolution_note(None, 1.0) is None
    steady = gpu_run.telemetry | {"power_w": np.full_like(gpu_run.telemetry["power_w"], 700.0)}
    assert folding.renewal(steady, folding.valid_windows(gpu_run.measurements, "random, 1 chunk")) is None


def test_power_shows_fold_stretch_and_resolution(gpu_run, held_run):
    axes = drawn(draw_power, gpu_run).axes
    assert [axis.get_ylabel() for axis in axes[::2]] == ["power (W)", "SM clock (MHz)", "temperature (°C)"]
    for place, name in enumerate(("random, 1 chunk", "random, 4 chunks")):
        windows = folding.valid_windows(gpu_run.measurements, name)
        folded, line = folding.fold(gpu_run.telemetry, windows, "power_w"), axes[0].lines[place]
        assert np.array_equal(line.get_ydata(), folded.median) and np.array_equal(line.get_xdata(), folded.phase)
        middle, time_s = windows[2], gpu_run.telemetry["time_s"]
        inside = (time_s >= middle.start_s) & (time_s <= middle.end_s)
        raw = gpu_run.telemetry["power_w"][inside]
        assert np.array_equal(axes[1].lines[place].get_ydata(), raw)
        assert axes[1].texts[place].get_text().endswith(f"std {np.std(raw):.1f} W")
    assert "1 chunk: NVML renews power every" in written(drawn(draw_power, held_run))
    assert "structure within an iteration is not resolved" in written(drawn(draw_timeline, held_run))
    assert "NVML renews" not in written(drawn(draw_power, gpu_run))


def test_ten_seconds_of_a_long_window_are_shown(tmp_path):
    run = read_microbench(synthetic_run(tmp_path / "run", repeats=1, calls=250, chunks=(1, 2), kinds=("random",)))
    x = drawn(draw_power, run).axes[1].lines[0].get_xdata()
    assert 9.9 < x[-1] <= 10.0 and 0 <= x[0] < 0.1


def test_a_quantity_that_the_device_does_not_have_gets_no_panel(gpu_run):
    no_clock = gpu_run.telemetry | {"sm_clock_mhz": np.full_like(gpu_run.telemetry["sm_clock_mhz"], np.nan)}
    run = dataclasses.replace(gpu_run, telemetry=no_clock)
    assert len(drawn(draw_power, run).axes) == 4
    assert len(drawn(draw_timeline, run).axes) == 4


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("slower", [1.0, 1.2])  # the profiler
def test_one_iteration_is_found_in_a_timeline(chunks, calls, slower):
    spans = synthetic_timeline(chunks, 0.058 * slower, calls)
    own, length_s = one_iteration(spans, 0.058, chunks)
    assert own[0].kind == "gemm" and own[0].start_s == 0
    assert [span.kind for span in own].count("gemm") == 2 * chunks
    assert [span.kind for span in own].count("softmax") == chunks
    # In a timeline's last call there is no next one to end it: it ends with its last kernel.
    assert math.isclose(length_s, 0.058 * slower, rel_tol=0.02 if calls > 1 else 0.05)
    gemms = [span for span in spans if span.kind == "gemm"]
    middle = gemms[(calls - 1) // 2 * 2 * chunks]
    absolute = [dataclasses.replace(span, start_s=span.start_s + middle.start_s) for span in own]
    assert all(math.isclose(span.start_s, spans[spans.index(middle) + i].start_s) for i, span in enumerate(absolute))


def test_the_timeline_draws_the_kernels_in_ms(gpu_run):
    axes = drawn(draw_timeline, gpu_run).axes
    assert len(axes) == 6
    spans, _ = one_iteration(gpu_run.timelines["best"], 0.0575, 4)
    bars = {bar.get_label(): bar for bar in axes[3].collections}
    assert set(bars) == {"gemm", "softmax", "copy", "other"}
    for kind, bar in bars.items():
        edges = [(path.vertices[:, 0].min(), path.vertices[:, 0].max()) for path in bar.get_paths()]
        own = [span for span in spans if span.kind == kind]
        assert np.allclose(edges, [(1e3 * s.start_s, 1e3 * (s.start_s + s.duration_s)) for s in own])
    folded = folding.fold(
        gpu_run.telemetry, folding.valid_windows(gpu_run.measurements, "random, 4 chunks"), "sm_clock_mhz"
    )
    line = axes[5].lines[0]
    assert np.array_equal(line.get_ydata(), folded.median)
    assert np.allclose(line.get_xdata(), folded.phase * 1e3 * gpu_run.pair["best"].time_s.median)


def test_what_is_missing_leaves_figures_out(gpu_path, gpu_run, tmp_path):
    assert not draw_power(new_figure(7, 4), dataclasses.replace(gpu_run, telemetry=None))
    bare = drawn(draw_timeline, dataclasses.replace(gpu_run, telemetry=None))
    assert len(bare.axes) == 2  # the kernels alone
    only = dataclasses.replace(gpu_run, timelines={"best": gpu_run.timelines["best"]})
    assert len(drawn(draw_timeline, only).axes) == 3
    path = synthetic_run(tmp_path / "a", chunks=(2,), kinds=("zero",), repeats=1)
    for timeline in path.glob("timeline-*"):
        timeline.unlink()
    names = [figure.name for figure in figures.plot_microbench(path)]
    assert names == ["throughput.png", "power.png", "energy_time.png"]  # nothing to compare with, and no kernels


def test_a_cpu_has_no_power(tmp_path):
    path = synthetic_run(tmp_path / "run", gpu=False)
    assert [figure.name for figure in figures.plot_microbench(path)] == ["throughput.png", "period.png"]
    run = read_microbench(path)
    left = drawn(draw_throughput, run).axes[0]
    assert left.get_ylabel() == "GEMM throughput (GFLOP/s)"
    expected = medians(run, lambda m: FLOPS / m.time_s / 1e9, "zero")
    assert np.allclose(points(left, "zero inputs")[1], expected)


def test_two_who_do_the_softmax_are_told_apart(tmp_path):
    path = synthetic_run(tmp_path / "run", chunks=(1, 4), repeats=2, calls=5)
    for line in (path / "records.jsonl").read_text().splitlines():
        record = json.loads(line)
        record |= {"variant": f"{record['variant']}, xla", "factors": record["factors"] | {"softmax": "xla"}}
        with (path / "records.jsonl").open("a") as records:
            records.write(json.dumps(record) + "\n")
    run = read_microbench(path)
    figures = [drawn(draw, run) for draw in (draw_throughput, draw_energy_time, draw_period)]
    assert all(figure.get_tightbbox().x0 >= 0 for figure in figures)
    for axis in (figures[0].axes[0], figures[2].axes[0]):
        labels = [container.get_label() for container in axis.containers]
        assert labels == ["random, pallas", "random, xla", "zero, pallas", "zero, xla"]
        assert len({container.lines[0].get_marker() for container in axis.containers}) == 4
    assert [len(axis.containers) for axis in figures[1].axes] == [2, 2]


def test_labels_keep_clear_of_each_other():
    figure = new_figure(5, 4)
    axis = figure.subplots()
    axis.plot([0, 10], [0, 10])
    crowd = [
        LabelledPoint(str(2**i), (x, x - 0.1, x + 0.1), (5.0, 4.9, 5.1), "black")
        for i, x in enumerate((5.0, 5.1, 5.25, 5.4, 5.6, 7.0))
    ]
    label_points(figure, axis, crowd)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    places = axis.transData.transform([(point.x[0], point.y[0]) for point in crowd])
    assert not any(box.contains(*place) for box in boxes for place in places)


def test_the_script_redraws_a_killed_run(tmp_path):
    path = synthetic_run(tmp_path / "run", chunks=(1, 4), repeats=2, calls=10)
    for name in ("records.jsonl", "telemetry.csv", "timeline-best.jsonl"):
        whole = (path / name).read_text()
        (path / name).write_text(whole[: -len(whole.splitlines()[-1]) // 2])
    assert not (path / "summary.json").exists()
    assert len(read_microbench(path).measurements) == 2 * 2 * 2 - 1
    script = Path(__file__).parents[2] / "scripts" / "plot.py"
    done = subprocess.run([sys.executable, script, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(path / name) for name in ALL]


def test_other_directories_are_no_microbenchmark(tmp_path):
    path = synthetic_run(tmp_path / "run", repeats=1, chunks=(1,), gpu=False)
    assert figures.is_microbench(path)
    assert read_microbench(path).device == "cpu"
    (path / "env.json").unlink()
    assert read_microbench(path).title.startswith("unknown device, M=32768")
    (path / "records.jsonl").write_text('{"variant": "cut')
    with pytest.raises(InputError, match="no whole record"):
        figures.plot_microbench(path)
    (path / "config.json").write_text(json.dumps({"tokens": 1024, "width": 128}))
    assert not figures.is_microbench(path)
    with pytest.raises(InputError, match=r"holds no records of microbench\.py"):
        figures.plot_microbench(path)
