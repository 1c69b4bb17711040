"""launch/kubernetes.yaml, launch/skypilot.yaml and launch/torchrun.py: what can be held without a cluster.

The commands are read by torchrun's own parser and by the reader of recipes; the manifest's is run, as two agents here.
"""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import runner
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing import api as torch_agent
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError
from torch.distributed.run import get_args_parser

from smoltrain.config.keys import read_key_options
from smoltrain.config.load import load_config, split_recipe_words
from smoltrain.config.schema import EngineSection
from smoltrain.distributed import stop
from smoltrain.distributed.world import free_port
from smoltrain.errors import BAD_INPUT, FAULT, STOPPED
from tests import launches, tiny

LAUNCH = launches.ROOT / "launch"
START = [".venv/bin/python", "launch/torchrun.py"]
CLAIM, SERVICE, JOB = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text(encoding="utf-8"))
SKY = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text(encoding="utf-8"))
POD = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]
# Read by `kubernetes-validate --strict`, which has the schemas of Kubernetes; a key that is not here was not.
CHECKED_KEYS = """accessModes action apiVersion backoffLimit claimName clusterIP command completionMode completions
    containerName containers cpu emptyDir env image kind limits medium memory metadata mountPath name nvidia.com/gpu
    onExitCodes onPodConditions operator parallelism persistentVolumeClaim podFailurePolicy publishNotReadyAddresses
    requests resources restartPolicy rules selector spec status storage subdomain template
    terminationGracePeriodSeconds type value values volumeMounts volumes workingDir batch.kubernetes.io/job-name"""


def load_torchrun_script() -> Any:
    spec = importlib.util.spec_from_file_location("torchrun_script", LAUNCH / "torchrun.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def read_command(words: list[str]) -> Namespace:
    """What torchrun makes of a command; its script and its recipe with all keys exist."""
    assert words[:2] == START
    given = get_args_parser().parse_args(words[2:])
    assert given.training_script == "launch/train.py"
    given.config = load_config(*split_recipe_words(read_key_options(given.training_script_args)))
    assert given.shutdown_timeout > EngineSection().lost_host_s, "a host may be lost after the signal to stop"
    return given


def command_of(index: int) -> list[str]:
    """The manifest's, as Kubernetes expands it in the pod of this index."""
    return [word.replace("$(JOB_COMPLETION_INDEX)", str(index)) for word in CONTAINER["command"]]


def find_keys(document: Any) -> set[str]:
    if isinstance(document, list):
        return set().union(*map(find_keys, document))
    if not isinstance(document, dict):
        return set()
    return set(document) | find_keys(list(document.values()))


def test_the_manifests_command_is_one_of_the_product() -> None:
    given = [read_command(command_of(index)) for index in range(JOB["spec"]["completions"])]
    assert [pod.node_rank for pod in given] == [0, 1]
    (first, _) = given
    assert int(first.nnodes) == JOB["spec"]["completions"] == JOB["spec"]["parallelism"]
    assert int(first.nproc_per_node) == CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert first.shutdown_timeout < POD["terminationGracePeriodSeconds"]
    work = Path(CONTAINER["volumeMounts"][0]["mountPath"])
    assert work in first.config.run.folder.parents
    assert work in Path(CONTAINER["workingDir"]).parents


def test_the_manifests_parts_name_each_other() -> None:
    job = JOB["metadata"]["name"]
    service = SERVICE["metadata"]["name"]
    assert read_command(command_of(0)).master_addr == f"{job}-0.{service}", "hostname and subdomain of the first pod"
    assert POD["subdomain"] == service
    assert SERVICE["spec"]["clusterIP"] == "None", "headless"
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    assert [mount["name"] for mount in CONTAINER["volumeMounts"]] == list(volumes)
    assert volumes["data"]["persistentVolumeClaim"]["claimName"] == CLAIM["metadata"]["name"]


def test_the_manifest_tries_again_what_another_try_mends() -> None:
    assert POD["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    mistake, stopped, _ = JOB["spec"]["podFailurePolicy"]["rules"]
    asked = {"containerName": CONTAINER["name"], "operator": "In"}
    assert mistake == {"action": "FailJob", "onExitCodes": asked | {"values": [BAD_INPUT]}}
    assert stopped == {"action": "Ignore", "onExitCodes": asked | {"values": [STOPPED]}}


def test_every_key_of_the_manifest_was_checked_against_the_schema() -> None:
    assert find_keys([CLAIM, SERVICE, JOB]) == set(CHECKED_KEYS.split())


def test_skypilots_command_is_one_of_the_product() -> None:
    told = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_GPUS_PER_NODE": "8"}
    told |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    assert set(re.findall(r"SKYPILOT_\w+", SKY["run"])) == set(told)
    shown = subprocess.run(
        ["bash", "-euc", SKY["run"].replace("exec ", "printf '%s\\n' ", 1)], env=os.environ | SKY["envs"] | told,
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    given = read_command(shown.stdout.splitlines())
    assert (given.nnodes, given.node_rank, given.nproc_per_node, given.master_addr) == ("2", 1, "8", "10.0.0.1")
    assert list(SKY["volumes"]) == [str(given.config.run.folder)]
    assert SKY["resources"]["job_recovery"]["recover_on_exit_codes"] == [STOPPED]
    source = re.fullmatch(r"source (\S+) && setup", SKY["setup"])
    assert source
    assert "\nsetup() {" in (launches.ROOT / source[1]).read_text(encoding="utf-8")


def test_what_the_page_says_of_deepspeeds_hostfile_is_so(tmp_path: Path) -> None:
    page = (launches.ROOT / "docs" / "clusters.md").read_text(encoding="utf-8")
    said = re.search(r"those that begin with (.+?)\.", page, re.DOTALL)
    assert said
    without_a_gpu: Any = None  # of which a method makes no use
    passed = [*runner.EXPORT_ENVS, *CUDA_Accelerator.export_envs(without_a_gpu)]
    assert sorted(re.findall(r"`(\w+)`", said[1])) == sorted(passed)
    dropped = ("GLOO_SOCKET_IFNAME", "HF_TOKEN", "WANDB_MODE", "OMP_NUM_THREADS")
    assert not [name for name in dropped if name.startswith(tuple(passed))]
    assert runner.DEEPSPEED_ENVIRONMENT_NAME == ".deepspeed_env"
    assert [str(Path.home()), "."] == runner.DEEPSPEED_ENVIRONMENT_PATHS
    assert runner.fetch_hostfile(str(tmp_path / "none")) is None, "this machine alone"
    (tmp_path / "hosts").write_text("n0 slots=8\nn1 slots=8\n")
    assert runner.fetch_hostfile(str(tmp_path / "hosts")) == {"n0": 8, "n1": 8}


def test_in_a_pod_the_first_process_is_known_as_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """An orphan has process 1 for a parent too, and leaves."""
    monkeypatch.delenv("SMOLTRAIN_SUPERVISOR", raising=False)
    monkeypatch.setattr(stop, "_parent_pid", lambda _pid: 1)
    monkeypatch.setattr(stop, "_command_line", lambda _pid: command_of(0))
    monkeypatch.setattr(sys, "argv", [read_command(command_of(0)).training_script])
    assert stop._find_launcher_links() == [(os.getpid(), 1)]


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ((STOPPED, STOPPED), STOPPED),
        ((BAD_INPUT, FAULT), BAD_INPUT),
        ((STOPPED, FAULT), FAULT),
        ((STOPPED, -signal.SIGKILL), FAULT),
    ],
)
def test_torchrun_ends_with_the_code_of_the_rank_that_failed_first(codes: tuple[int, ...], expected: int) -> None:
    failures = {}
    for rank, code in reversed(list(enumerate(codes))):
        failures[rank] = ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file="<NONE>")
        failures[rank].timestamp = rank
    assert load_torchrun_script().choose_exit_code(ChildFailedError("train", failures)) == expected


@pytest.mark.parametrize(
    ("error", "code", "want"),
    [
        (DistNetworkError("... port: 29500, code: -98, name: EADDRINUSE"), BAD_INPUT, "want a port that is free;"),
        (RendezvousConnectionError("The connection to the C10d store has failed."), FAULT, "want a first machine that"),
    ],
)
def test_machines_that_do_not_meet_are_one_line(
    error: Exception, code: int, want: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_torchrun_script()

    def meet(_words: list[str]) -> None:
        raise error

    monkeypatch.setattr(torch_agent, "_terminate_process_handler", torch_agent._terminate_process_handler)
    monkeypatch.setattr(script, "main", meet)
    assert script.run_torchrun([]) == code
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: the machines do not meet: saw {error}, {want}")


def test_torchrun_heeds_the_first_of_two_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """SLURM preempts with two SIGTERM at once; the handler is the one that torch registers."""
    monkeypatch.setattr(torch_agent, "_terminate_process_handler", torch_agent._terminate_process_handler)
    script = load_torchrun_script()
    heard: list[str] = []

    def hear_two(_words: list[str]) -> None:
        signal.signal(signal.SIGTERM, torch_agent._terminate_process_handler)
        try:
            signal.raise_signal(signal.SIGTERM)
        except SignalException as first:
            heard.append(first.sigval.name)
            signal.raise_signal(signal.SIGTERM)
            heard.append("has awaited the ranks")
            raise

    monkeypatch.setattr(script, "main", hear_two)
    before = {number: signal.getsignal(number) for number in stop.STOP_SIGNALS}
    try:
        assert script.run_torchrun([]) == STOPPED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert heard == ["SIGTERM", "has awaited the ranks"]


@pytest.mark.slow
def test_a_pod_that_is_asked_to_stop_ends_both_with_everything_saved(tmp_path: Path) -> None:
    words = tiny.words(tmp_path, "phases.main.steps=500", "checkpoint.every=0", "sample.every=1000")
    here = {"--nproc-per-node": "1", "--master-addr": "127.0.0.1", "--master-port": str(free_port())}
    pods = []
    for index in range(2):
        command = [str(launches.BIN / "python")]
        for word in command_of(index)[1:-2]:  # but for Python, recipe and folder
            option = word.partition("=")[0]
            command.append(f"{option}={here[option]}" if option in here else word)
        with (tmp_path / f"log{index}").open("wb") as out:
            pods.append(
                subprocess.Popen(
                    [*command, "quickstart", *words], stdout=out, stderr=subprocess.STDOUT, cwd=launches.ROOT,
                    env=launches.environment() | {"GLOO_SOCKET_IFNAME": "lo"}, start_new_session=True,
                )
            )  # fmt: skip
    try:
        launches.wait_for_step(tmp_path / "runs" / "quickstart", 2, pods[0])
        pods[1].send_signal(signal.SIGTERM)  # as the kubelet does
        assert [pod.wait(60) for pod in pods] == [STOPPED, STOPPED], (tmp_path / "log0").read_text()
    finally:
        launches.kill_all(words)
    said = (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert "Traceback" not in said
    assert list((tmp_path / "runs" / "quickstart" / "checkpoints").glob("*/manifest.json"))
