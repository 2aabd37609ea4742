"""The kernel timeline: names, extraction from a profile, and a trace of this machine."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.bench import timeline
from jaxchunk.bench.hlo import softmax_kernels
from jaxchunk.bench.softmax_kernel import KERNEL_NAME
from jaxchunk.bench.softmax_workload import SoftmaxWorkload
from jaxchunk.bench.timeline import KernelSpan, classify_kernel, extract_timeline, read_timeline, record_timeline
from jaxchunk.errors import InputError

KERNELS = {
    "gemm": [
        "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NTN",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_kernel__5x_cublas",
        "sm80_xmma_bf16bf16_tn_n_tilesize128x128",
        "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nt",
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(T1::Params)",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(cublasSplitKParams<float>)",
        "splitKreduce_kernel",
        "void gemvx::kernel<int, int, __nv_bfloat16>",
        "gemm_fusion_dot_7_0",
        "fusion_dot_3",
    ],
    "softmax": [
        KERNEL_NAME,
        "loop_exponential_fusion",
        "input_reduce_fusion_2",
        "triton_softmax_1_0",
        "loop_subtract_exp_fusion",
        "loop_divide_fusion",
    ],
    "copy": ["MemcpyD2D", "MemcpyH2D", "Memset", "[CUDA memcpy DtoD]"],
    "other": [
        "loop_broadcast_fusion",
        "wrapped_add",
        "copy_fusion",
        "loop_expand_dims_fusion",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL",
        "dotted",
        "prism9_kernel",
        "a kernel that nobody has seen before",
        "",
    ],
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in KERNELS.items() for name in names])
def test_a_name_tells_the_kind(kind, name):
    assert classify_kernel(name) == kind
    assert kind in timeline.KINDS


def test_a_name_known_from_the_program_needs_no_pattern():
    assert classify_kernel("loop_convert_fusion") == "other"
    assert classify_kernel("loop_convert_fusion", {"loop_convert_fusion"}) == "softmax"


def profile(**planes):
    """In the shape of a `jax.profiler.ProfileData`: {plane: {line: [(name, start_ns, duration_ns)]}}."""

    def event(name, start_ns, duration_ns):
        return types.SimpleNamespace(name=name, start_ns=start_ns, duration_ns=duration_ns)

    def line(name, events):
        return types.SimpleNamespace(name=name, events=(event(*e) for e in events))

    return types.SimpleNamespace(
        planes=(
            types.SimpleNamespace(name=name, lines=(line(*item) for item in lines.items()))
            for name, lines in planes.items()
        )
    )


GPU_PLANES = {
    "/host:CPU": {"python": [("call", 0, 9e9)], "Stream of thought": [("host", 1, 1)]},
    "/device:GPU:0": {
        "XLA Ops": [("fusion.3", 1000, 9000), ("custom-call.1", 10, 10)],
        "Stream #13(Compute)": [(KERNEL_NAME, 5000.0, 1000.0), ("nvjet_hsh", 2000.0, 3000.0), ("who", 9000.0, 4.0)],
        "Stream #14(MemcpyD2D)": [("MemcpyD2D", 2500.0, 10.0)],
    },
}


def test_every_event_of_the_gpus_streams_is_a_span_in_order():
    found = extract_timeline(profile(**GPU_PLANES))
    assert found.null_reason is None
    assert [(span.name, span.kind) for span in found.spans] == [
        ("nvjet_hsh", "gemm"),
        ("MemcpyD2D", "copy"),
        (KERNEL_NAME, "softmax"),
        ("who", "other"),
    ]
    assert [span.start_s for span in found.spans] == pytest.approx([0, 0.5e-6, 3e-6, 7e-6])
    assert [span.duration_s for span in found.spans] == pytest.approx([3e-6, 1e-8, 1e-6, 4e-9])
    named = extract_timeline(profile(**GPU_PLANES), {"who"})
    assert [span.kind for span in named.spans] == ["gemm", "copy", "softmax", "softmax"]


@pytest.mark.parametrize(
    ("planes", "reason"),
    [
        ({}, "the profile holds no GPU"),
        ({"/host:CPU": GPU_PLANES["/host:CPU"]}, "the profile holds no GPU"),
        ({"/device:GPU:0": {"XLA Ops": [("fusion", 0, 1)], "Stream #1": []}}, "the profile holds no kernel of the GPU"),
    ],
)
def test_no_kernels_come_with_the_reason(planes, reason):
    found = extract_timeline(profile(**planes))
    assert found.spans == ()
    assert found.null_reason.startswith(reason)


def test_the_file_holds_one_line_a_kernel_and_is_read_back(tmp_path):
    spans = extract_timeline(profile(**GPU_PLANES)).spans
    path = tmp_path / "timeline.jsonl"
    timeline.write_timeline(spans, path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [dataclasses.asdict(span) for span in spans]
    assert lines[1] == {"name": "MemcpyD2D", "kind": "copy", "start_s": 5e-7, "duration_s": 1e-8}
    assert read_timeline(path) == list(spans)
    assert read_timeline(tmp_path / "absent.jsonl") == []


def test_a_trace_is_taken_of_the_calls_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda path: profile(**GPU_PLANES))
    calls = []

    def call():
        calls.append(None)
        return jnp.zeros(3) + 1

    path = tmp_path / "timeline.jsonl"
    found = record_timeline(call, path, calls=4, softmax_kernels={"who"})
    assert len(calls) == 1 + 4  # one before the trace
    assert read_timeline(path) == list(found.spans)
    assert found.spans[-1] == KernelSpan("who", "softmax", pytest.approx(7e-6), pytest.approx(4e-9))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of a machine without a GPU")
def test_without_a_gpu_there_is_a_reason_and_no_file(tmp_path):
    path = tmp_path / "timeline.jsonl"
    found = record_timeline(lambda: jnp.ones((64, 64)) @ jnp.ones((64, 64)), path)
    assert found == timeline.Timeline((), "the profile holds no GPU")
    assert not path.exists()


def test_no_calls_are_refused(tmp_path):
    with pytest.raises(InputError, match="calls is 0; it must be at least 1"):
        record_timeline(lambda: None, tmp_path / "timeline.jsonl", calls=0)


@pytest.mark.gpu
@pytest.mark.parametrize("softmax", ["pallas", "xla"])
def test_on_a_gpu_the_gemms_and_softmaxes_of_every_chunk_are_found(softmax, tmp_path):
    workload = SoftmaxWorkload(8192, 512, 32768, "bfloat16", softmax)
    a, b = workload.operands("random")
    program = jax.jit(workload.accumulate, static_argnums=2).lower(a, b, 4).compile()
    found = record_timeline(
        lambda: program(a, b), tmp_path / "timeline.jsonl", calls=2, softmax_kernels=softmax_kernels(program)
    )
    assert found.null_reason is None
    kinds = [span.kind for span in found.spans]
    assert kinds.count("gemm") >= 2 * 4 * 2
    assert kinds.count("softmax") >= 4 * 2
    busy = {kind: sum(span.duration_s for span in found.spans if span.kind == kind) for kind in timeline.KINDS}
    assert busy["gemm"] + busy["softmax"] > 0.8 * sum(busy.values()), found.spans
