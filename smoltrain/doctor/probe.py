"""What torch says of this machine, asked in a process of its own: an import or a driver may crash or hang.

python -m smoltrain.doctor.probe            the facts of TorchFacts, as JSON
python -m smoltrain.doctor.probe --flash    a line of JSON for each FlashAttention: its name, and what is wrong
"""

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from smoltrain.doctor.child import await_child, child_environment, start_child

MODULE = "smoltrain.doctor.probe"
LIMIT_S = 30.0  # for torch to be imported, from a slow disk too
TRIAL_SIZE = 256  # of the matrices whose product is compared


@dataclass(frozen=True)
class TorchFacts:
    """What the probe has learnt."""

    torch: str  # its version
    cuda_build: str | None  # the CUDA that it was built for; None: for CPUs alone
    gpus: list[dict[str, Any]] = field(default_factory=list)  # name, memory_bytes, has_bf16
    cuda_error: str = ""  # what CUDA says of its devices
    nccl: str | None = None
    precision: str = ""  # in which this CPU multiplies fastest, and why
    bf16_error: float = 0.0  # relative, of a product in bf16 on the device of rank 0
    has_flash: bool = False  # whether a package of FlashAttention is there, which may be broken


class Probe:
    """The facts of this machine, asked once."""

    def __init__(self) -> None:
        self._facts: TorchFacts | None = None
        self._failure: str | None = None

    def ask(self) -> TorchFacts:
        """The facts. Errors: RuntimeError, why torch cannot tell."""
        if self._facts is None and self._failure is None:
            result = await_child(start_child(["-m", MODULE], child_environment()), LIMIT_S)
            if result.code == 0:
                self._facts = TorchFacts(**json.loads(result.out.strip().splitlines()[-1]))
            else:
                self._failure = result.describe_failure(LIMIT_S)
        if self._facts is None:
            raise RuntimeError(self._failure)
        return self._facts


def try_flash_packages() -> tuple[dict[str, str], str]:
    """(FlashAttention -> what is wrong with it, "" if nothing; why the process that tried ended too early, or "")."""
    result = await_child(start_child(["-m", MODULE, "--flash"], child_environment()), LIMIT_S)
    tried: dict[str, str] = {}
    for line in result.out.splitlines():
        title, wrong = json.loads(line)
        tried[title] = wrong
    return tried, "" if result.code == 0 else result.describe_failure(LIMIT_S)


def collect_torch_facts() -> TorchFacts:
    """In the process of its own."""
    import torch
    from torch.cuda import nccl

    from smoltrain.kernels.flash_attention import TITLES
    from smoltrain.kernels.precision import find_fastest_precision

    gpus: list[dict[str, Any]] = []
    cuda_error = ""
    device = torch.device("cpu")
    nccl_version = None
    if torch.version.cuda:
        try:
            torch.cuda.init()
            for number in range(torch.cuda.device_count()):
                of_gpu = torch.cuda.get_device_properties(number)
                gpus.append({"name": of_gpu.name, "memory_bytes": of_gpu.total_memory})
            device = torch.device("cuda")
        except (RuntimeError, AssertionError) as error:
            cuda_error = str(error).splitlines()[0]
        nccl_version = ".".join(map(str, nccl.version()))
        for gpu in gpus:
            gpu["has_bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)
    fastest = find_fastest_precision()
    a = torch.arange(TRIAL_SIZE**2, device=device, dtype=torch.float32).sin().view(TRIAL_SIZE, TRIAL_SIZE).bfloat16()
    exact = a.double() @ a.double()
    product = (a @ a).double()
    return TorchFacts(
        torch=torch.__version__,
        cuda_build=torch.version.cuda,
        gpus=gpus,
        cuda_error=cuda_error,
        nccl=nccl_version,
        precision=f"{fastest.name}, as {fastest.reason}",
        bf16_error=float((product - exact).norm() / exact.norm()),
        has_flash=any(importlib.util.find_spec(package.split(".")[0]) for package in TITLES),
    )


def print_flash_trials() -> None:
    """In the process of its own: import each package, and say so before the next one may crash."""
    from smoltrain.kernels.flash_attention import TITLES, load_flash_attention

    for package, title in TITLES.items():
        if importlib.util.find_spec(package.split(".")[0]) is None:
            continue
        wrong = ""
        try:
            load_flash_attention(package, in_sdpa=False)
        except ModuleNotFoundError as error:
            if error.name == package:  # version 4 is a part of the package of version 2, which may lack it
                continue
            wrong = str(error)
        except (ImportError, ValueError, OSError) as error:
            wrong = str(error).splitlines()[0]
        print(json.dumps([title, wrong]), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--flash"]:
        print_flash_trials()
    else:
        print(json.dumps(asdict(collect_torch_facts())))
