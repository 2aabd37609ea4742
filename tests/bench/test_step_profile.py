"""The profile of a step: attribution of kernels, idle time, and the roofline beside it."""

import gzip
import json
import re

import jax
import pytest

from jaxchunk.bench import step_profile, step_profile_report
from jaxchunk.bench.roofline import COMPONENTS, Rates, step_costs
from jaxchunk.errors import InputError
from jaxchunk.models import hf, qwen2
from jaxchunk.training import step as training_step
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.flops import training_flops_per_token
from jaxchunk.training.trace import PROGRAM

HLO = """
ENTRY %main (p: f32[8]) -> f32[8] {
  %gemm_fusion.2 = bf16[8]{0} custom-call(%p), custom_call_target="__cublas$gemm", metadata={op_name="jit(train_step)/jvp(mlp)/dot_general" stack_frame_id=4}
  %loop_add-fusion.7 = f32[8]{0} fusion(%p), kind=kLoop, calls=%f, metadata={op_name="jit(train_step)/optimizer/add"}
  ROOT %fmha.1 = bf16[8]{0} custom-call(%p), metadata={op_name="jit(train_step)/transpose(jvp(attention))/attention_core/dot"}
}
"""  # noqa: E501
MS = 10**9  # picoseconds


def plane(*streams):
    """The text of a profile of a GPU; each event is a name, begin and length in milliseconds, and its HLO operation."""
    names = sorted({text for events in streams for name, _, _, op in events for text in (name, op) if text})
    number = {name: i + 1 for i, name in enumerate(names)}
    lines = []
    for i, events in enumerate(streams):
        text = "".join(
            f"events {{ metadata_id: {number[name]} offset_ps: {start * MS} duration_ps: {length * MS} "
            + (f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else "")
            + " }\n"
            for name, start, length, op in events
        )
        lines.append(f'lines {{ id: {i} name: "Stream #{i}(Compute)" {text} }}')
    lines.append('lines { id: 99 name: "XLA Ops" events { metadata_id: 1 duration_ps: 1 } }')  # the same in other words
    metadata = "".join(f'event_metadata {{ key: {i} value {{ id: {i} name: "{n}" }} }}\n' for n, i in number.items())
    metadata += 'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }'
    return f'planes {{ name: "/device:GPU:0" {" ".join(lines)} {metadata} }}'


STREAMS = (
    [
        ("nvjet_hsh_128x256", 0, 40, "gemm_fusion.2"),
        ("loop_add_fusion_7", 40, 10, ""),  # in a CUDA graph: only its name is known
        ("cudnn_generated_fort_native_sdpa_sm90_flash", 60, 20, "fmha.1"),
        ("nvjet_tst_64x64", 80, 10, ""),
        ("row_kernel_mosaic_gpu", 90, 10, "custom-call.9"),
    ],
    [("MemcpyD2D", 30, 20, "copy.1")],
)


@pytest.fixture
def trace(tmp_path):
    serialized = jax.profiler.ProfileData.text_proto_to_serialized_xspace(plane(*STREAMS))
    directory = tmp_path / "profile"
    (directory / "plugins").mkdir(parents=True)
    (directory / "plugins" / "host.xplane.pb").write_bytes(serialized)
    with gzip.open(directory / PROGRAM, "wt") as file:
        file.write(HLO)
    return directory


def test_every_kernel_is_attributed_and_idle_time_is_left(trace):
    profile = step_profile.read(trace, steps=2)
    milliseconds = {part: round(1e3 * seconds, 6) for part, seconds in profile.by_part.items()}
    assert milliseconds == {
        ("mlp", "gemm"): 20.0,
        ("optimizer", "fusion"): 5.0,
        ("attention_core", "attention"): 10.0,  # the innermost scope
        ("unattributed", "gemm"): 5.0,
        ("unattributed", "pallas"): 5.0,
        ("unattributed", "copy"): 10.0,
    }
    assert profile.step_s == pytest.approx(0.05) and profile.idle_s == pytest.approx(0.005)  # overlap is no idle time
    assert profile.top[0] == ("nvjet_hsh_128x256", "mlp", pytest.approx(0.02))


def test_what_an_operation_contains_is_not_counted_twice():
    text = plane([("while", 0, 10, "while.1"), ("add", 1, 3, "add.1"), ("mul", 5, 4, "mul.1"), ("add", 10, 2, "add.1")])
    kernels = list(step_profile.kernels_of(jax.profiler.ProfileData.from_text_proto(text), {}))
    assert [round(1e3 * kernel.self_s, 6) for kernel in kernels] == [3.0, 3.0, 4.0, 2.0]


def test_the_time_of_a_launch_ahead_is_that_of_the_kernel_it_waits_for():
    """Kernels of a stream follow each other, but the next may begin early: none of their time may vanish."""
    line = [("gemm", 0, 10, "dot.1"), ("gemm", 8, 12, "dot.2"), ("gemm", 19, 5, "dot.3")]
    kernels = list(step_profile.kernels_of(jax.profiler.ProfileData.from_text_proto(plane(line)), {}))
    assert [round(1e3 * kernel.self_s, 6) for kernel in kernels] == [10.0, 10.0, 4.0]


def test_the_roofline_has_the_flops_of_the_step():
    model = qwen2.SIZES["qwen2-0.5b"]
    shape = {"tokens": 65536, "seq_len": 1024, "micro_batches": 1, "lmhead_chunks": 4, "itemsize": 2}
    costs = step_costs(model, **shape)
    assert [cost.component for cost in costs] == list(COMPONENTS)
    # FlashAttention's backward computes the scores again: 7 L T S D for the 6 that a step needs.
    again = model.num_hidden_layers * shape["tokens"] * shape["seq_len"] * model.hidden_size
    assert sum(c.flops for c in costs) - again == pytest.approx(65536 * training_flops_per_token(model, 1024))
    head = costs[COMPONENTS.index("lm_head")]
    assert Rates(690e12, 4.3e12).seconds(head) == pytest.approx(head.flops / 690e12)  # bound by its products
    optimizer = costs[COMPONENTS.index("optimizer")]
    assert optimizer.elementwise_bytes == 32 * qwen2.num_params(model)


def test_a_page_and_a_figure_beside_the_run(trace):
    run, model = trace.parent, qwen2.SIZES["tiny"]
    config = {"model": "tiny", "batch_size": 4, "seq_len": 16, "lmhead_chunks": 2, "compute_dtype": "bfloat16"}
    chosen = {"model": hf.to_hf_config(model, "float32"), "micro_batch_size": 2, "lmhead_chunks": 2}
    (run / "config.json").write_text(json.dumps(config | {"profile_steps": "3:4"}))
    (run / "env.json").write_text(json.dumps({"device_kind": "NVIDIA H200", "chosen": chosen}))
    text = step_profile_report.write(run, None, 4.3)
    assert re.search(r"\| mlp \| [\d.e-]+ \| [\d.e-]+ \| 0\.\d\d \| 20\.00 \| 20\.00 \| - \| - \| - \| - \|", text)
    assert "989 TFLOP/s and 4.3 TB/s" in text and "A step takes 50.00 ms of the device, 5.00 of them idle." in text
    assert (run / "step_profile.png").read_bytes().startswith(b"\x89PNG")
    (run / "config.json").write_text(json.dumps(config | {"profile_steps": None}))
    assert "No trace: train with --profile_steps" in step_profile_report.write(run, None, None)
    for directory, words in ((run / "profile" / "x", "has no trace"), (run, "holds no run of train.py")):
        with pytest.raises(InputError, match=words):
            step_profile.read(directory, 1) if directory != run else step_profile_report.write(trace, None, None)


def test_every_part_of_the_step_is_named():
    model = qwen2.Qwen2Config(300, 32, 1, 4, 2, 48, tie_word_embeddings=True)
    config = TrainConfig(seq_len=16, batch_size=2, compute_dtype="bfloat16", lmhead_chunks=2)
    optimizer = training_step.make_optimizer(config)
    state = jax.eval_shape(lambda p: training_step.init_state(optimizer, p), qwen2.param_shapes(model))
    ids = jax.ShapeDtypeStruct((2, 16), "int32")
    step = jax.jit(training_step.make_train_step(config, model, qwen2.Execution(), optimizer, 2))
    text = step.lower(state, {"tokens": ids, "labels": ids}).as_text(debug_info=True)
    found = {step_profile.component_of(name) for name in re.findall(r'loc\("([^"]*)"', text)}
    assert found >= set(COMPONENTS)
