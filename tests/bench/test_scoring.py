"""The scoring benchmark: what it refuses, what it compiles, what it says of measurements; its peer is a fake torch."""

import dataclasses
import importlib.metadata
import importlib.util
import json
import sys
import types

import fake_torch
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk import plotting
from jaxchunk.bench import scoring, scoring_peer
from jaxchunk.bench.lm_head_shapes import Shape
from jaxchunk.bench.scoring_summary import Scoring, sentences, summarize, table
from jaxchunk.errors import InputError
from jaxchunk.inference import scoring as inference_scoring
from jaxchunk.measuring.protocol import Measurement, Variant

CONFIG = scoring.ScoringBenchConfig(shapes=("640x16x97:1,5",), repeats=2, window_s=0.01, settle_s=0.0)
SHAPE = Shape(640, 16, 97, (1, 5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shapes": ()}, "--shapes is ; give each shape once"),
        ({"shapes": ("8x4x9:1", "8x4x9:2")}, "--shapes is 8x4x9:1 8x4x9:2; give each shape once"),
        ({"shapes": ("8x4x9",)}, "--shapes has '8x4x9'; write tokens x width x vocabulary : chunks"),
        ({"shapes": ("8x0x9:1",)}, "--shapes has 8x0x9:1; all must be at least 1"),
        ({"shapes": ("8x4x9:1,0",)}, "--shapes has 8x4x9:1,0; all must be at least 1"),
        ({"dtype": "float16"}, "--dtype is float16"),
        ({"window_s": 0.0}, "--window_s is 0.0"),
        ({"repeats": 0}, "--repeats is 0"),
        ({"implementations": ("pallas",)}, "--implementations: implementation='pallas' cannot run"),
        ({"peers": ("vllm",)}, "--peers has vllm; the only one is torch"),
    ],
)
def test_flags_out_of_their_domain(change, words):
    with pytest.raises(InputError, match=words):
        scoring.validate(dataclasses.replace(CONFIG, **change))


def test_defaults_are_what_score_does_on_32k_tokens():
    gpu = scoring.default_config("gpu")
    shapes = [scoring.parse_shape(text) for text in gpu.shapes]
    assert [shape[:3] for shape in shapes] == [(32768, 896, 151936), (32768, 4096, 128256)]
    assert gpu.implementations[-1] == "xla" and gpu.dtype == "bfloat16"
    assert scoring.validate(scoring.default_config("cpu")) == [Shape(2048, 64, 4096, (1, 8))]


def test_a_peer_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--peers: torch is not installed"):
        scoring_peer.check(["torch"])


def test_variants_score_the_same_and_have_their_errors():
    found = {s.variant.factors["method"]: s for s in scoring.compile_variants(CONFIG, SHAPE, limit_bytes=None)}
    ours = ["xla, 1 chunk", "xla, 2 chunks", "xla, 5 chunks"]
    assert list(found) == ["GEMM floor", "float32 logits", *ours]
    assert [s.is_default for s in found.values()] == [False, False, False, True, False]  # 512 tokens at a time
    assert inference_scoring.head_chunks(640, "xla") == 2
    assert found["GEMM floor"].errors is None and found["GEMM floor"].variant.call().shape == (640, 97)
    log_probs = [np.asarray(found[method].variant.call()) for method in ("float32 logits", *ours)]
    for other in log_probs[1:]:
        np.testing.assert_allclose(other, log_probs[0], atol=1e-5)
    assert all(max(found[method].errors.values()) < 1e-5 for method in ("float32 logits", *ours))
    logits_bytes = 4 * 640 * 97
    assert found["float32 logits"].temporary_bytes >= logits_bytes > found["xla, 5 chunks"].temporary_bytes


def test_each_implementation_is_measured_at_the_count_that_score_takes_with_it():
    config = dataclasses.replace(CONFIG, implementations=("xla", "fused_xla"))
    found = [s.variant.factors["method"] for s in scoring.compile_variants(config, SHAPE, limit_bytes=None)]
    assert found[2:] == [f"{name}, {n}" for name in ("xla", "fused_xla") for n in ("1 chunk", "2 chunks", "5 chunks")]
    counts = {name: inference_scoring.head_chunks(32768, name) for name in ("xla", "pallas", "fused_xla", "fused")}
    assert counts == {"xla": 64, "pallas": 64, "fused_xla": 64, "fused": 4}  # `fused_xla` makes logits


def test_errors_are_of_the_rows_that_are_compared():
    operands = jax.random.normal(jax.random.key(0), (5000, 8)), jnp.eye(9, 8), jnp.arange(5000) % 9
    cases = scoring._cases(operands)
    exact = lambda x, W, y: jnp.take_along_axis(jax.nn.log_softmax(x @ W.T), y[:, None], 1)[:, 0]  # noqa: E731
    assert max(scoring._errors(exact, cases).values()) < 1e-5
    off = scoring._errors(lambda x, W, y: exact(x, W, y).at[jnp.arange(2048) * 5000 // 2048].add(0.5), cases)
    assert off == pytest.approx({"random": 0.5, "confident": 0.5}, abs=1e-5)
    between = scoring._errors(lambda x, W, y: exact(x, W, y).at[1].add(0.5), cases)  # row 1 is not compared
    assert max(between.values()) < 1e-5
    assert jnp.all(cases["confident"].exact >= -np.log(9)) and cases["random"].exact.shape == (2048,)


def test_what_does_not_fit_is_left_out_with_a_word(caplog):
    methods = [s.variant.factors["method"] for s in scoring.compile_variants(CONFIG, SHAPE, limit_bytes=400_000)]
    assert "xla, 1 chunk" not in methods and "xla, 5 chunks" in methods
    assert "640x16x97, xla, 1 chunk is left out: it needs 0.00 of 0.0 GB" in caplog.text


def scored(method, **about):
    call = Variant(f"8x4x9, {method}", lambda: None, factors={"shape": "8x4x9", "method": method})
    return Scoring(call, 10**9, **about)


def measured(seconds):
    reason = "no GPU"
    none = dict.fromkeys(
        ("energy_j", "energy_bound_j", "energy_source", "power_w", "power_w_std", "sm_clock_mhz", "temperature_c",
         "throttle")
    )  # fmt: skip
    return [
        Measurement(f"8x4x9, {method}", repeat, calls=2, time_s=s * (1 + repeat), energy_null_reason=reason, **none)
        for repeat in range(3)
        for method, s in seconds.items()
    ]


def test_the_report_compares_with_float32_logits():
    errors = {"random": 1e-3, "confident": 2e-6}
    scorings = [
        scored("GEMM floor"), scored("float32 logits", errors=errors),
        scored("xla, 1 chunk", errors=errors, is_default=True), scored("torch", errors=errors, is_peer=True),
    ]  # fmt: skip
    seconds = {"GEMM floor": 0.2, "float32 logits": 0.5, "xla, 1 chunk": 0.25, "torch": 1.0}
    rows = summarize(measured(seconds), scorings)
    assert [round(row["time_over_float32"]["median"], 3) for row in rows] == [0.4, 1.0, 0.5, 2.0]
    assert [round(row["time_over_floor"]["median"], 3) for row in rows] == [1.0, 2.5, 1.25, 5.0]
    assert sentences(rows) == [
        "8x4x9: xla, 1 chunk, the default of `score`, has 2.00 (2.00 to 2.00) times the speed of float32 logits, and "
        "1.00 GB of temporaries; the logits' GEMM alone has 2.50 (2.50 to 2.50) times that speed",
        "energy null: no GPU",
    ]
    assert "| 8x4x9 | torch | 2000.00 |" in table(rows) and "| 1.00 | 1.0e-03 | 2.0e-06 |" in table(rows)
    without = summarize(measured({"xla, 1 chunk": 0.25}), scorings[2:3])
    assert sentences(without)[0].startswith("8x4x9: no conclusion: it takes both the default of `score` and float32")


def test_the_figure_needs_the_floor(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(CONFIG)))
    rows = summarize(measured({"xla, 1 chunk": 0.25}), [scored("xla, 1 chunk")])
    (tmp_path / "summary.json").write_text(json.dumps(rows))
    assert plotting.plot_scoring(tmp_path) is None


def test_torch_is_measured_beside_ours(monkeypatch):
    functional = types.ModuleType("functional")
    functional.linear = lambda x, W: fake_torch.Tensor(x.array @ W.array.T)
    monkeypatch.setitem(sys.modules, "torch", fake_torch.make())
    monkeypatch.setitem(sys.modules, "torch.nn", types.SimpleNamespace(functional=functional))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.2.3")
    config = dataclasses.replace(CONFIG, peers=("torch",))
    *_, ours, theirs = scoring.compile_variants(config, SHAPE, limit_bytes=None)
    assert theirs.variant.name == "640x16x97, torch eager 1.2.3, float32 logits" and theirs.is_peer
    assert max(theirs.errors.values()) < 1e-5 and theirs.temporary_bytes is None
    np.testing.assert_allclose(theirs.variant.call().to_jax(), ours.variant.call(), atol=1e-5)


def test_a_torch_that_fails_is_left_out(monkeypatch, caplog):
    def fails(*_):
        raise RuntimeError("out of memory\nand a long story")

    monkeypatch.setitem(sys.modules, "torch", fake_torch.make())
    monkeypatch.setitem(sys.modules, "torch.nn", types.SimpleNamespace(functional=types.SimpleNamespace(linear=fails)))
    found = list(scoring.compile_variants(dataclasses.replace(CONFIG, peers=("torch",)), SHAPE, limit_bytes=None))
    assert len(found) == 5 and not any(s.is_peer for s in found)
    assert "640x16x97, torch is left out: its first call failed (RuntimeError: out of memory)" in caplog.messages


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
def test_torch_itself():
    config = dataclasses.replace(CONFIG, peers=("torch",), dtype="bfloat16")
    *_, theirs = scoring.compile_variants(config, SHAPE, limit_bytes=None)
    assert theirs.is_peer and theirs.errors["random"] < 0.05
