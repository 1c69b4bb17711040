"""What a profile of a GPU's step is made into; the events are those of a GPU, made up."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

from benchmarks.gpu_profile import COPIES, describe_profile, find_kind, find_timeline, list_kernel_runs
from benchmarks.gpu_task import FULL, RECIPE
from benchmarks.peak import Peaks
from benchmarks.roofline import ATTENTION, ELEMENTWISE, PRODUCTS, UPDATE
from smoltrain.config.load import load_config
from smoltrain.profiling.kernel_times import sum_by_kernel

PEAKS = Peaks(790e12, 4.3e12, None, "")


def event(name: str, start_us: float, end_us: float, device: Any = DeviceType.CUDA, **more: Any) -> Any:
    span = SimpleNamespace(start=start_us, end=end_us)
    return SimpleNamespace(name=name, device_type=device, time_range=span, **{"is_user_annotation": False, **more})


EVENTS = [
    event("nvjet_tst_128x256_64x4", 100.0, 200.0),
    event("aten::mm", 0.0, 500.0, DeviceType.CPU),
    event("## Call CompiledFxGraph", 0.0, 500.0, is_user_annotation=True),
    event("nvjet_tst_128x256_64x4", 205.0, 255.0),
    event("triton_poi_fused_add_0", 250.0, 300.0),  # on another stream
    event("Memcpy HtoD (Pinned -> Device)", 400.0, 420.0),
]


def test_kernels_launches_and_gaps() -> None:
    runs = list_kernel_runs(EVENTS)
    assert [run.name for run in runs] == [EVENTS[i].name for i in (0, 3, 4, 5)]
    times = sum_by_kernel(runs)
    assert [(name, launches) for name, launches, _ in times] == [
        ("nvjet_tst_128x256_64x4", 2), ("triton_poi_fused_add_0", 1), ("Memcpy HtoD (Pinned -> Device)", 1)
    ]  # fmt: skip
    assert times[0][2] == pytest.approx(150e-6)
    timeline = find_timeline(runs)
    assert timeline.span_s == pytest.approx(320e-6)
    assert timeline.busy_s == pytest.approx(215e-6), "kernels of two streams count once where they overlap"
    assert timeline.gaps_s == [pytest.approx(100e-6)], "5 us between two kernels are no gap"


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", PRODUCTS),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", PRODUCTS),
        ("void cutlass::device_kernel<flash::FlashAttnFwd<...>>", ATTENTION),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", ATTENTION),
        ("fmha_cutlassB_bf16_aligned_64x64_k64_sm80", ATTENTION),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", UPDATE),
        ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL", UPDATE),
        ("Memset (Device)", COPIES),
        ("triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_1", ELEMENTWISE),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", ELEMENTWISE),
        ("_liger_cross_entropy_kernel", ELEMENTWISE),
    ],
)
def test_work_is_told_by_the_names_of_kernels(kernel: str, kind: str) -> None:
    assert find_kind(kernel) == kind


def test_the_page_tells_each_kind_of_work_beside_the_roofline() -> None:
    profiled = SimpleNamespace(events=lambda: EVENTS)
    section = load_config(RECIPE, []).model
    text = "\n".join(describe_profile(FULL, section, profiled, 0.4, PEAKS))  # pyright: ignore[reportArgumentType]
    assert "A step takes 400.0 ms; the least that this device needs for it is 2" in text
    assert "4 kernels and copies in 0.3 ms, of which the device had nothing to do for 0.1 ms; 1 gaps" in text
    assert "| matrix products | 2 | 0.15 | " in text
    assert "| elementwise | 1 | 0.05 | " in text
    assert "| `nvjet_tst_128x256_64x4` | 2 | 0.15 | 68.2% |" in text
