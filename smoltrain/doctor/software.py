"""Python, packages, torch, CUDA, NCCL, FlashAttention and bf16: is what is installed what a run needs?"""

import platform
import tomllib
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from smoltrain.config.schema import Config
from smoltrain.doctor.check import Finding, worst_finding
from smoltrain.doctor.child import run_command
from smoltrain.doctor.probe import Probe, try_flash_packages
from smoltrain.errors import abbreviate_list

CHECKOUT = Path(__file__).parent.parent.parent / "pyproject.toml"
INSTALL = "`pip install -c constraints.txt -e .` in the checkout, or `pip install -U smoltrain`"
GPU_DEVICES = Path("/dev")  # where NVIDIA's driver has nvidia0, nvidia1, ...
MAX_BF16_ERROR = 0.01  # relative, of a product: three times what rounding makes of it


class Bounds(NamedTuple):
    """What pyproject.toml asks for."""

    python: SpecifierSet
    needed: list[Requirement]
    extras: list[Requirement]  # which a run does without


def read_bounds(pyproject: Path = CHECKOUT) -> Bounds:
    """Of the checkout, else of the installed package. Errors: PackageNotFoundError if there is neither."""
    if pyproject.is_file():
        project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
        extras: list[Requirement] = []
        for texts in project["optional-dependencies"].values():
            extras += [Requirement(text) for text in texts]
        needed = [Requirement(text) for text in project["dependencies"]]
        return Bounds(SpecifierSet(project["requires-python"]), needed, extras)
    installed = metadata.metadata("smoltrain")
    texts = installed.get_all("Requires-Dist") or []
    needed = [Requirement(text) for text in texts if "extra ==" not in text]
    extras = [Requirement(text) for text in texts if "extra ==" in text]
    return Bounds(SpecifierSet(installed["Requires-Python"]), needed, extras)


def check_python() -> Finding:
    """The version of Python."""
    wanted = read_bounds().python
    version = platform.python_version()
    if not wanted.contains(version, prereleases=True):
        return Finding("fault", f"{version}, and smoltrain wants {wanted}", f"a Python {wanted}, and a new .venv of it")
    return Finding("ok", f"{version}, {platform.python_implementation()} on {platform.system()}, {platform.machine()}")


def check_packages() -> Finding:
    """Every package that pyproject.toml names, in a version between its bounds; extras where they are installed."""
    bounds = read_bounds()
    missing: list[str] = []
    outside: list[str] = []
    odd: list[str] = []
    for wanted in bounds.needed:
        version = find_version(wanted.name)
        if version is None:
            missing.append(wanted.name)
        elif not wanted.specifier.contains(version, prereleases=True):
            outside.append(f"{wanted.name} {version}, wanted {wanted.specifier}")
    for wanted in bounds.extras:
        version = find_version(wanted.name)
        if version is not None and not wanted.specifier.contains(version, prereleases=True):
            odd.append(f"{wanted.name} {version}, wanted {wanted.specifier}")
    findings: list[Finding] = []
    if missing:
        findings.append(Finding("fault", f"not installed: {abbreviate_list(missing)}", INSTALL))
    if outside:
        findings.append(Finding("fault", abbreviate_list(outside), INSTALL))
    if odd:
        findings.append(Finding("warning", abbreviate_list(sorted(set(odd))), f"{INSTALL}, with its extra"))
    return worst_finding(findings or [Finding("ok", f"{len(bounds.needed)} packages between pyproject's bounds")])


def find_version(package: str) -> str | None:
    """Of an installed package; None without it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_torch(probe: Probe) -> Finding:
    """Whether torch can be imported, and for what it was built."""
    try:
        facts = probe.ask()
    except RuntimeError as error:
        saw = f"`import torch` fails: {error}"
        return Finding("fault", saw, "install torch anew (`pip install --force-reinstall -c constraints.txt torch`)")
    built = f"for CUDA {facts.cuda_build}" if facts.cuda_build else "for CPUs alone"
    return Finding("ok", f"{facts.torch}, built {built}")


def check_cuda(probe: Probe, config: Config | None, devices: Path = GPU_DEVICES) -> Finding:
    """Whether the GPUs of this machine can be used, and whether the recipe wants one."""
    facts = probe.ask()
    asks = config is not None and config.engine.device == "cuda"
    if facts.gpus:
        names = [f"{gpu['name']} ({gpu['memory_bytes'] / 2**30:.0f} GiB)" for gpu in facts.gpus]
        return Finding("ok", f"{len(names)} GPUs: {', '.join(names)}")
    driver = sorted(path.name for path in devices.glob("nvidia[0-9]*"))
    if facts.cuda_build is None and driver:
        saw = f"{len(driver)} GPUs of NVIDIA's driver, and a torch for CPUs alone"
        return Finding("fault" if asks else "warning", saw, "install a torch for CUDA (pytorch.org/get-started)")
    if facts.cuda_build is not None:
        saw = f"a torch for CUDA {facts.cuda_build}, and no GPU" + (f": {facts.cuda_error}" if facts.cuda_error else "")
        advice = "`nvidia-smi` must list them: driver, container (`--gpus all`), CUDA_VISIBLE_DEVICES"
        return Finding("fault" if asks or driver else "warning", saw, f"{advice}; on purpose? engine.device=cpu")
    if asks:
        return Finding("fault", "engine.device=cuda, and no GPU here", "engine.device=auto, or a machine with a GPU")
    return Finding("ok", "no GPU here: runs train on the CPU")


def check_nccl(probe: Probe) -> Finding:
    """The library by which GPUs reduce."""
    facts = probe.ask()
    if not facts.gpus:
        return Finding("ok", "not needed: without GPUs the ranks take gloo")
    if facts.nccl is None:
        return Finding("fault", "this torch has no NCCL", "a torch for CUDA with NCCL, as pip's are")
    return Finding("ok", facts.nccl)


def check_flash_attention(probe: Probe) -> Finding:
    """Whether FlashAttention, where it is installed, was built for this torch: import it in a process of its own."""
    if not probe.ask().has_flash:
        return Finding("ok", "not installed: torch's SDPA takes its place")
    tried, ended = try_flash_packages()
    findings: list[Finding] = []
    advice = (
        "build it for this torch (`pip install --no-build-isolation --force-reinstall flash-attn`), or uninstall it"
    )
    for title, wrong in tried.items():
        if wrong:
            findings.append(Finding("warning", f"{title} is installed, and not for this torch: {wrong}", advice))
        else:
            findings.append(Finding("ok", f"{title} can be imported"))
    if ended:
        saw = f"importing FlashAttention kills the process ({ended}), and every run that would take it"
        findings.append(Finding("fault", saw, advice))
    return worst_finding(findings or [Finding("ok", "not installed: torch's SDPA takes its place")])


def check_bf16(probe: Probe, config: Config | None) -> Finding:
    """Whether a product in bf16 is right here, and whether the recipe's precision suits the device."""
    facts = probe.ask()
    asked = config.engine.precision if config else "auto"
    if facts.bf16_error > MAX_BF16_ERROR or facts.bf16_error != facts.bf16_error:
        saw = f"a product in bf16 is off by {facts.bf16_error:.1%} here"
        return Finding("fault", saw, "engine.precision=fp32, and another torch: it computes wrong numbers")
    if facts.gpus and asked == "bf16" and not all(gpu["has_bf16"] for gpu in facts.gpus):
        return Finding("fault", "engine.precision=bf16, and this GPU has none", "engine.precision=fp16 or auto")
    if not facts.gpus and asked == "fp16":
        return Finding("warning", "fp16 is asked for, which DeepSpeed cannot run on a CPU: bf16 stands in", "auto")
    fastest = "bf16" if facts.gpus else facts.precision
    return Finding("ok", f"a product in bf16 is off by {facts.bf16_error:.2%}, as rounding is; auto takes {fastest}")


def check_gpu_clocks(probe: Probe) -> Finding:
    """Whether a GPU is held back now: heat, power, or somebody's limit. Never run on a GPU by us."""
    if not probe.ask().gpus:
        return Finding("ok", "no GPU here")
    fields = (
        "index,clocks.sm,clocks.max.sm,clocks_throttle_reasons.hw_slowdown,clocks_throttle_reasons.sw_thermal_slowdown"
    )
    told = run_command(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"], 5.0)
    if told is None:
        return Finding("warning", "nvidia-smi does not say how fast the GPUs are", "look at `nvidia-smi -q -d CLOCK`")
    return judge_gpu_clocks(told)


def judge_gpu_clocks(told: str) -> Finding:
    """By the lines of nvidia-smi, one a GPU."""
    slow: list[str] = []
    for line in told.strip().splitlines():
        number, _, _, hardware, thermal = [word.strip() for word in line.split(",")]
        if "Active" in (hardware, thermal):
            slow.append(number)
    if slow:
        saw = f"GPU {', '.join(slow)} slows down by itself: heat or power"
        return Finding(
            "warning", saw, "look at `nvidia-smi -q -d PERFORMANCE,TEMPERATURE,POWER`: cooling, power cables"
        )
    return Finding("ok", "no GPU is held back by heat or power")
