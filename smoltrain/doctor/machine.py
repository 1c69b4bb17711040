"""`smoltrain doctor`: all that is looked at on one machine, in order."""

import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from smoltrain.config.schema import Config
from smoltrain.doctor.all_reduce import LIMIT_S as ALL_REDUCE_S
from smoltrain.doctor.all_reduce import check_all_reduce
from smoltrain.doctor.check import Check, Finding
from smoltrain.doctor.limits import check_locked_memory, check_memory, check_open_files, check_shared_memory
from smoltrain.doctor.needs import CPU_RANKS, RunNeeds, estimate_needs
from smoltrain.doctor.probe import LIMIT_S as PROBE_S
from smoltrain.doctor.probe import Probe
from smoltrain.doctor.processor import check_cpu_clocks, check_neighbours, check_threads
from smoltrain.doctor.reach import check_data, check_hub, check_tokenizer, check_wandb
from smoltrain.doctor.report import run_and_print_checks
from smoltrain.doctor.settings import check_launcher_settings, check_slow_settings
from smoltrain.doctor.software import (
    check_bf16,
    check_cuda,
    check_flash_attention,
    check_gpu_clocks,
    check_nccl,
    check_packages,
    check_python,
    check_torch,
)
from smoltrain.doctor.storage import check_disk
from smoltrain.files import user_cache_folder

SLOW_ANSWER_S = 20.0  # of data or a tokenizer that lie behind a network
RUNS = Path("runs")  # where runs are without a recipe that says another place


CheckRecipe = Callable[[Config], None]  # raises the UserError that a run would end with


def examine_machine(config: Config | None, ranks: int | None, check_recipe: CheckRecipe, *, as_json: bool) -> int:
    """Look at everything and print it; the exit code. Without a config at what any run would need."""
    return run_and_print_checks(list_machine_checks(config, ranks, check_recipe), as_json=as_json)


def list_machine_checks(config: Config | None, ranks: int | None, check_recipe: CheckRecipe) -> list[Check]:
    """Every check; nothing is looked at yet. Nothing here needs torch to be imported, which may be what is broken."""
    probe = Probe()
    needs = cache(partial(_estimate_needs, config, ranks, probe)) if config else None
    runs = config.run.folder if config else RUNS
    checks = [
        Check("python", check_python),
        Check("packages", check_packages),
        Check("torch", partial(check_torch, probe), PROBE_S + 5),
        Check("CUDA", partial(check_cuda, probe, config)),
        Check("NCCL", partial(check_nccl, probe)),
        Check("flash-attn", partial(check_flash_attention, probe), PROBE_S + 5),
        Check("bf16", partial(check_bf16, probe, config)),
        Check("threads", partial(check_threads, os.environ)),
        Check("CPU clocks", check_cpu_clocks),
        Check("GPU clocks", partial(check_gpu_clocks, probe)),
        Check("neighbours", check_neighbours),
        Check("settings", partial(check_slow_settings, os.environ)),
        Check("launcher", partial(check_launcher_settings, os.environ)),
        Check("open files", check_open_files),
        Check("locked memory", check_locked_memory),
        Check("memory", partial(check_memory, needs), SLOW_ANSWER_S),
        Check("/dev/shm", partial(_check_shared_memory, probe)),
        Check("runs", partial(check_disk, "run.folder", runs, needs)),
        Check("cache", partial(check_disk, "SMOLTRAIN_CACHE", user_cache_folder())),
    ]
    if config is not None:
        if config.data.cache is not None:
            checks.append(Check("data.cache", partial(check_disk, "data.cache", config.data.cache)))
        checks += [
            Check("recipe", partial(_check_recipe, config, check_recipe), PROBE_S),
            Check("tokenizer", partial(check_tokenizer, config), SLOW_ANSWER_S),
            Check("data", partial(check_data, config), SLOW_ANSWER_S),
            Check("Hub", partial(check_hub, config)),
            Check("W&B", partial(check_wandb, config)),
        ]
    checks.append(Check("all-reduce", partial(check_all_reduce, "cpu"), ALL_REDUCE_S + 5))
    checks.append(Check("NCCL all-reduce", partial(_check_nccl_all_reduce, probe), ALL_REDUCE_S + 5))
    return checks


def _estimate_needs(config: Config, ranks: int | None, probe: Probe) -> RunNeeds:
    """Of the ranks that `smoltrain train` would start here. Errors: UserError."""
    facts = probe.ask()
    if facts.gpus and config.engine.device in ("auto", "cuda"):
        return estimate_needs(config, ranks or len(facts.gpus), facts.gpus[0]["memory_bytes"])
    return estimate_needs(config, ranks or CPU_RANKS, None)


def _check_recipe(config: Config, check_recipe: CheckRecipe) -> Finding:
    check_recipe(config)
    return Finding("ok", f"{config.run.recipe or config.run.name}: model, optimizer and DeepSpeed's config agree")


def _check_shared_memory(probe: Probe) -> Finding:
    return check_shared_memory(len(probe.ask().gpus))


def _check_nccl_all_reduce(probe: Probe) -> Finding:
    if len(probe.ask().gpus) < 2:
        return Finding("ok", "not tried: it takes two GPUs")
    return check_all_reduce("cuda")
