"""The profile of a training step: categories of kernels, what is counted on a CPU and on a GPU, the report."""

import json
import re
import sys
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import __main__, bench_profile, harness, kernel_categories
from benchmarks.environment import REPOSITORY
from benchmarks.harness import Settings
from benchmarks.kernel_categories import (
    BATCH_NORM,
    CATEGORIES,
    CONVOLUTIONS,
    COPIES,
    EPILOGUE,
    MATRIX_PRODUCTS,
    OTHER,
    POINTWISE,
    POOLING,
    STANDARDIZATION,
    UPDATE,
    by_category,
    category_of_name,
)
from benchmarks.report import documents, tables
from benchmarks.results import BENCHES, NOT_MEASURED, Kernel, Profile, Results
from benchmarks.training import Batch, training_step

from .module_helpers import on_one_thread
from .report_cases import MATMUL, environment
from .test_bench_step import tiny_networks

one_thread = pytest.fixture(on_one_thread, autouse=True)

NAMES = {
    "nfnets_kernels::weight_standardize_backward": STANDARDIZATION,
    "nfnets_kernels::scaled_activation": POINTWISE,
    "nfnets_kernels::agc_": UPDATE,
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_cgasize1x1x1_stage4_warpgroup"
    "size1x1x1_g1_tensor16x8x16_execute_segment_k_off_kernel__5x_cudnn": CONVOLUTIONS,
    "sm80_xmma_wgrad_implicit_gemm_indexed_tf32f32_tf32f32_f32_nhwckrsc_nhwc_tilesize128x128x16_stage4_warpsize2x2x1"
    "_g1_tensor16x8x8_kernel_cudnn": CONVOLUTIONS,
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x5_nhwc_unity_stride>"
    "(cutlass_tensorop_bf16_s16816dgrad_optimized_bf16_128x128_32x5_nhwc_unity_stride::Params)": CONVOLUTIONS,
    "void cudnn::cnn::wgrad2d_grouped_direct_kernel<float, float, float, float, true>(int)": CONVOLUTIONS,
    "void at::native::(anonymous namespace)::conv_depthwise2d_forward_kernel<1, float, int>()": CONVOLUTIONS,
    "triton_tem_fused_convolution_17": CONVOLUTIONS,
    "aten::convolution_backward": CONVOLUTIONS,
    "aten::mkldnn_convolution": CONVOLUTIONS,
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT": MATRIX_PRODUCTS,
    "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize32x32x64_stage3_cublas": MATRIX_PRODUCTS,
    "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_32x1_tn_align8>()": MATRIX_PRODUCTS,
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>()": MATRIX_PRODUCTS,
    "aten::addmm": MATRIX_PRODUCTS,
    "void cudnn::bn_fw_tr_1C11_kernel_NCHW<float, float, int, 512, true, 1, true>()": BATCH_NORM,
    "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>()": BATCH_NORM,
    "void cudnn::batchnorm_fwtr_nhwc_semiPersist<__nv_bfloat16, __nv_bfloat16, float, float, float, 8>()": BATCH_NORM,
    "void at::native::batch_norm_collect_statistics_channels_last_kernel<at::native::Var, c10::BFloat16, float, 4>()":
        BATCH_NORM,
    "void at::native::batch_norm_backward_elemt_channels_last_kernel<4, c10::BFloat16, float, float>()": BATCH_NORM,
    "triton_red_fused__native_batch_norm_legit_functional_convolution_relu_7": BATCH_NORM,
    "aten::native_batch_norm_backward": BATCH_NORM,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>, "
    "std::array<char*, 3ul> >(int, at::native::CUDAFunctor_add<c10::BFloat16>, std::array<char*, 3ul>)": POINTWISE,
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, "
    "float, float, at::native::binary_internal::MulFunctor<float> > > >()": POINTWISE,
    "triton_poi_fused_add_convolution_relu_threshold_backward_5": POINTWISE,
    "triton_per_fused_sum_3": POINTWISE,
    "triton_poi_fused__to_copy_mul_relu_1": POINTWISE,
    "aten::threshold_backward": POINTWISE,
    "aten::mul": POINTWISE,
    "triton_poi_fused__to_copy_0": COPIES,
    "triton_poi_fused_clone_view_12": COPIES,
    "void cudnn::engines_precompiled::nhwcToNchwKernel<__nv_bfloat16, __nv_bfloat16, float, true, false>()": COPIES,
    "void cudnn::ops::nchwToNhwcKernel<float, float, float, false, true, (cudnnKernelDataType_t)2>()": COPIES,
    "Memcpy DtoD (Device -> Device)": COPIES,
    "Memset (Device)": COPIES,
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda"
    "()#3}>()": COPIES,
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16tofloat32_copy_kernel_cuda(at::TensorItera"
    "torBase&)::{lambda(c10::BFloat16)#1}, std::array<char*, 2ul> >()": COPIES,
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul> >()":
        COPIES,
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::OpaqueType<4u>, unsigned, 1>()": COPIES,
    "aten::copy_": COPIES,
    "void at::native::(anonymous namespace)::max_pool_forward_nhwc<c10::BFloat16, int>()": POOLING,
    "void at::native::(anonymous namespace)::avg_pool2d_out_cuda_frame_nhwc<c10::BFloat16, float>()": POOLING,
    "triton_poi_fused_convolution_max_pool2d_with_indices_relu_9": POOLING,
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float>, 4>>()": POOLING,
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous namespace)::"
    "TensorListMetadata<3>, at::native::FusedSgdMathFunctor<float, 3>, double, float*>()": UPDATE,
    "aten::_fused_sgd_": UPDATE,
    "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, c10::BFloat16, float>()": OTHER,
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float, at::native::func_wrapper_t<float, "
    "at::native::sum_functor<float, float, float> >, 4> >()": OTHER,
    "aten::empty": OTHER,
}  # fmt: skip


@pytest.mark.parametrize("name, category", NAMES.items())
def test_kernels_of_torch_and_cudnn_land_in_their_category(name, category):
    assert category_of_name(name) == category


OURS = {"agc": UPDATE, "sgd_agc": UPDATE, "weight_standardize": STANDARDIZATION, "residual": EPILOGUE,
        "scaled_activation": POINTWISE, "plan": UPDATE}  # fmt: skip


def test_our_kernels_land_in_their_category():
    package, csrc = REPOSITORY / "nfnets_kernels" / "triton_kernels", REPOSITORY / "csrc" / "cuda"
    seen = Counter()
    for path in package.glob("*.py"):
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE):
            assert category_of_name(name) == OURS[path.stem], name
            seen["triton"] += 1
    for path in csrc.glob("*.cu"):
        for name in re.findall(r"__global__ void __launch_bounds__\(.*?\) (\w+)\(", path.read_text()):
            full = f"void nfk::cuda::(anonymous namespace)::{name}<float, __nv_bfloat16>(nfk::cuda::Table)"
            assert category_of_name(full) == OURS[path.stem], name
            seen["cuda"] += 1
    assert seen["triton"] >= 10 and seen["cuda"] >= 3
    ops = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("nfnets_kernels::")}
    assert len(ops) >= 7
    assert not {op for op in ops if category_of_name(op) in (OTHER, BATCH_NORM)}


def profiled(*kernels: Kernel, batch_norm: bool = False, step_ms: float = 10.0) -> Profile:
    return Profile("case", "network", "ours", "cuda", batch_norm, 1, step_ms, list(kernels))


def test_what_a_name_alone_does_not_tell():
    statistics, add = "batch_norm_collect_statistics_kernel", "vectorized_elementwise_kernel<CUDAFunctor_add>"
    found = [Kernel(statistics, False, 1.0, 2.0), Kernel(add, False, 2.0, 3.0), Kernel(add, True, 4.0, 5.0)]
    assert by_category(profiled(*found)) == {POINTWISE: (2.0, 3.0), STANDARDIZATION: (1.0, 2.0), UPDATE: (4.0, 5.0)}
    assert BATCH_NORM in by_category(profiled(*found, batch_norm=True))
    assert profiled(*found).gap_ms == 3.0
    assert profiled(*found, step_ms=5.0).gap_ms == 0.0


def test_operators_are_not_counted_twice():
    """What calls and what is called: together they take no longer than the call itself."""
    ours, timm, _ = tiny_networks()
    for network, update in ((ours, "clipping and optimizer"), (timm, "aten::_fused_sgd_")):
        step = training_step(network, Batch.random("cpu", 4, 32))
        step()
        start = time.perf_counter()
        found = bench_profile.kernels(step, 2, on_gpu=False)
        elapsed = 1e3 * (time.perf_counter() - start)
        assert 0 < 2 * sum(kernel.ms for kernel in found) <= elapsed
        assert [kernel.ms for kernel in found] == sorted((kernel.ms for kernel in found), reverse=True)
        launches = {(kernel.name, kernel.updating): kernel.launches for kernel in found}
        convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in network.model.modules())
        assert launches["aten::convolution_backward", False] <= convolutions
        assert launches[update, True] == 1
        assert ("aten::convolution_backward", True) not in launches


def event(key: str, microseconds: float, count: int, kind=DeviceType.CUDA, annotation=False) -> SimpleNamespace:
    return SimpleNamespace(
        key=key,
        self_device_time_total=microseconds,
        self_cpu_time_total=1e6,
        count=count,
        device_type=kind,
        is_user_annotation=annotation,
    )


def test_on_a_gpu_its_kernels_are_counted_and_nothing_else(monkeypatch):
    events = [
        event("aten::mul", 5.0, 1, kind=DeviceType.CPU),  # the time of what it launched, once more
        event("cudaLaunchKernel", 0.0, 1, kind=DeviceType.CPU),
        event("Optimizer.step#SGD.step", 7.0, 1, annotation=True),
        event("vectorized_elementwise_kernel<MulFunctor>", 5000.0, 2),
        event("Memcpy DtoD (Device -> Device)", 1000.0, 1),
    ]
    told = []

    class Profiled:
        def __init__(self, activities):
            told.append(len(activities))

        def __enter__(self):
            return self

        def __exit__(self, *error):
            told.append("ended")

        def key_averages(self):
            return events

    monkeypatch.setattr(bench_profile, "profile", Profiled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("synchronized"))
    found = list(bench_profile.watched(lambda: told.append("run"), on_gpu=True))
    assert found == [("vectorized_elementwise_kernel<MulFunctor>", 5.0, 2), ("Memcpy DtoD (Device -> Device)", 1.0, 1)]
    assert told == [2, "run", "synchronized", "ended"]


def run(monkeypatch, folder, *arguments) -> Results:
    command = ["benchmarks", "--device", "cpu", "--no-keep-memory", "--only", "profile", "--output", str(folder)]
    monkeypatch.setattr(sys, "argv", [*command, "--batch-size", "2", "--image-size", "32", *arguments])
    monkeypatch.setattr(harness, "measure_bandwidth", lambda device, clock: {"copy": 1e9})
    monkeypatch.setattr(harness, "measure_matmul", lambda device, clock: MATMUL)
    monkeypatch.setattr(bench_profile, "make_networks", tiny_networks)
    assert __main__.main() == 0
    return Results.load(folder)


def test_the_command_profiles_every_network_and_reports_it(monkeypatch, tmp_path):
    stored = run(monkeypatch, tmp_path, "--full")
    assert [(one.case, one.contestant) for one in stored.profiles] == [
        (f"training step, batch 2 at 32, {precision}", name)
        for precision in ("bfloat16 autocast", "float32")
        for name in ("ours", "timm", "BatchNorm")
    ]
    ours, _, twin = stored.profiles[:3]
    assert (ours.backend, ours.batch_norm, ours.steps, twin.backend, twin.batch_norm) == ("cpu", False, 3, "", True)
    assert STANDARDIZATION in by_category(ours) and BATCH_NORM in by_category(twin)
    assert {CONVOLUTIONS, UPDATE} < set(by_category(ours)) & set(by_category(twin))
    columns, rows = tables.table(stored, "profile")
    assert columns == ["Case", "What", "ours", "timm", "BatchNorm"]
    assert {len(row) for row in rows} == {5}
    assert rows[0][:2] == [ours.case, CONVOLUTIONS] and [row[1] for row in rows].count("step") == 2
    standardized = next(row for row in rows if row[1] == STANDARDIZATION)
    assert standardized[4] == "-" and re.fullmatch(r"[\d.]+ ms, \d+%, \d+x", standardized[2])
    summary = (tmp_path / "summary.md").read_text()
    assert f"## {BENCHES['profile']}\n\nSelf time of operators" in summary
    assert tables.kernel_table(stored).markdown() in summary
    assert (tmp_path / "profile.png").stat().st_size > 10_000
    lines = (tmp_path / "kernels.csv").read_text().splitlines()
    assert len(lines) == 1 + sum(len(one.kernels) for one in stored.profiles)
    assert lines[0].startswith("case,contestant,name,updating,ms,launches,date")


def test_quickly_there_is_one_precision_and_compiled_networks_are_for_gpus(monkeypatch, tmp_path):
    stored = run(monkeypatch, tmp_path, "--quick")
    assert [one.case for one in stored.profiles] == ["training step, batch 2 at 32, bfloat16 autocast"] * 3
    monkeypatch.setattr(Settings, "on_gpu", True)
    monkeypatch.setattr(bench_profile, "make_networks", tiny_networks)
    compiled = {
        (quick, dtype): sum(
            network.compiled
            for network in bench_profile.forms(
                Settings("cpu", quick, 0, None, 2, 32), Batch.random("cpu", 2, 32, dtype)
            )
        )
        for quick in (True, False)
        for dtype in (torch.bfloat16, torch.float32)
    }
    assert compiled == {
        (True, torch.bfloat16): 0, (True, torch.float32): 0, (False, torch.bfloat16): 3, (False, torch.float32): 0
    }  # fmt: skip


def session() -> SimpleNamespace:
    told = SimpleNamespace(settings=Settings("cpu", True, 0, None, 2, 32), profiles=[], incidents=[])
    told.results = told
    told.add_profile, told.report_incident = told.profiles.append, told.incidents.append
    return told


def test_a_network_that_is_wrong_or_cannot_be_compiled_has_no_profile(monkeypatch):
    told, (ours, timm, _) = session(), tiny_networks()
    torch.nn.init.constant_(timm.model.fc.weight, float("nan"))
    bench_profile.add(told, "case", timm, Batch.random("cpu", 2, 32))

    def broken(*arguments):
        raise RuntimeError("no compiler\nanywhere")

    monkeypatch.setattr(bench_profile, "measure", broken)
    bench_profile.add(told, "case", bench_profile.compiled(ours), Batch.random("cpu", 2, 32))
    assert told.profiles == []
    assert [(one.kind, one.reason) for one in told.incidents] == [
        ("failed", "timm: the loss is nan"),
        ("skipped", "ours, torch.compile: no compiler"),
    ]
    with pytest.raises(RuntimeError):
        bench_profile.add(told, "case", ours, Batch.random("cpu", 2, 32))


def test_what_an_earlier_run_has_profiled_is_not_profiled_again(monkeypatch):
    told, (ours, *_) = session(), tiny_networks()
    told.profiles.append(Profile("case", "ours", "ours", "cpu", False, 1, 1.0, []))
    monkeypatch.setattr(bench_profile, "measure", lambda session, case, network, batch: case)
    for case in ("case", "another"):
        bench_profile.add(told, case, ours, Batch.random("cpu", 2, 32))
    assert told.profiles[1:] == ["another"]


def test_older_results_have_no_profiles(tmp_path):
    Results(environment("Some GPU"), profiles=[profiled(Kernel("x", False, 1.0, 1.0))]).save(tmp_path)
    stored = json.loads((tmp_path / "results.json").read_text())
    assert Results.load(tmp_path).profiles == [profiled(Kernel("x", False, 1.0, 1.0))]
    del stored["profiles"]
    (tmp_path / "results.json").write_text(json.dumps(stored))
    assert Results.load(tmp_path).profiles == []
    assert f"## {BENCHES['profile']}\n\n{NOT_MEASURED}" in documents.summary(Results.load(tmp_path))


def test_a_gpu_is_idle_where_no_kernel_runs():
    results = Results(environment("Some GPU"), profiles=[profiled(Kernel("sgemm", False, 7.5, 3.0))])
    assert tables.table(results, "profile").rows == [
        ["case", MATRIX_PRODUCTS, "7.50 ms, 75%, 3x"],
        ["", "idle, waiting for the host", "2.50 ms, 25%"],
        ["", "step", "10.0 ms, 3x"],
    ]


def test_every_category_has_a_pattern():
    assert {category for category, _ in kernel_categories.PATTERNS} == set(CATEGORIES) - {OTHER}
