"""Environment variables that cost time, and what launchers leave behind."""

import pytest

from smoltrain.doctor.settings import SLOW_SETTINGS, check_launcher_settings, check_slow_settings

SLOW = {
    "CUDA_LAUNCH_BLOCKING": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "TORCHDYNAMO_DISABLE": "1", "TORCH_COMPILE_DEBUG": "1", "PYTORCH_JIT": "0",
    "NCCL_DEBUG": "TRACE", "NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1",
    "TRITON_INTERPRET": "1", "ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1", "OMP_WAIT_POLICY": "ACTIVE",
    "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "7", "PYTHONMALLOC": "debug", "PYTHONDEVMODE": "1",
    "PYTHONTRACEMALLOC": "1", "LD_PRELOAD": "/usr/lib/libasan.so.8",
}  # fmt: skip
HARMLESS = {
    "CUDA_LAUNCH_BLOCKING": "0", "TORCH_DISTRIBUTED_DEBUG": "OFF", "PYTORCH_JIT": "1", "NCCL_DEBUG": "WARN",
    "OMP_WAIT_POLICY": "passive", "ONEDNN_VERBOSE": "0", "LD_PRELOAD": "/usr/lib/libjemalloc.so.2", "PYTHONDEVMODE": "",
}  # fmt: skip


def test_the_values_below_are_of_all_settings() -> None:
    assert set(SLOW) == {setting.name for setting in SLOW_SETTINGS}


@pytest.mark.parametrize("name", SLOW)
def test_a_variable_that_costs_time_is_named_with_what_it_does(name: str) -> None:
    found = check_slow_settings({name: SLOW[name]})
    assert found.status == "warning"
    assert found.saw.startswith(f"{name}={SLOW[name]}: ")
    assert f"unset {name}" in found.advice


def test_other_values_cost_nothing() -> None:
    assert check_slow_settings(HARMLESS).status == "ok"
    assert check_slow_settings(SLOW).saw.count("=") >= len(SLOW)


@pytest.mark.parametrize(
    ("environment", "status", "said"),
    [
        ({}, "ok", "no launcher"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "warning", "RANK=0 of WORLD_SIZE=2: a run would wait for the other ranks"),
        ({"RANK": "3"}, "fault", "RANK makes no sense: '3'"),
    ],
)
def test_what_a_launcher_left_behind_is_found(environment: dict[str, str], status: str, said: str) -> None:
    found = check_launcher_settings(environment)
    assert (found.status, found.saw[: len(said)]) == (status, said)
