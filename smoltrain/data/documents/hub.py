"""Read from the Hugging Face Hub: which files a dataset has, and how the Hub is asked. Nothing is written there.

HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and the cache work as huggingface_hub documents them. It would try a Hub that is
out of reach for half a minute, so the first question of each kind is asked here, once and with a limit.
"""

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.shard import exception_message, get_file_system
from smoltrain.errors import Problem, UserError, suggest_choice

T = TypeVar("T")
HUB_ANSWER_TIMEOUT_S = 8.0  # for each first question
OTHER_DATA = "data.path=FOLDER of .parquet or .jsonl.zst files"


def fetch_dataset_commit(data: SourceSection) -> str:
    """The commit (sha) at which the dataset stands now. Errors: UserError if there is none that this token may read."""
    name, api = str(data.hub), HfApi()

    def ask() -> str:
        api.auth_check(name, repo_type="dataset")  # what a gated dataset is called may be read by all, but not its rows
        return str(api.dataset_info(name).sha)

    try:
        return ask_with_timeout(HUB_ANSWER_TIMEOUT_S, ask)
    except Exception as error:  # as above
        raise UserError(hub_problem(error, "dataset", name, "data.hub", OTHER_DATA)) from None


def list_dataset_files(source: SourceSection, split: str, commit: str, key: str) -> list[tuple[str, str, int]]:
    """The files of the dataset's configuration and split at that commit: path in it, hf:// URL with the commit, bytes.

    No data is downloaded. Errors: UserError if the dataset has no such configuration or split, or cannot be listed.
    """
    keys = f"{key}.hub, {key}.hub_config or {key}.hub_split"
    try:
        import datasets
    except ImportError:
        want = f"`pip install datasets`, or {OTHER_DATA}"
        raise UserError(Problem("a package is missing to read the Hub", "no datasets", want, f"{key}.hub")) from None
    try:
        builder = datasets.load_dataset_builder(
            f"hf://datasets/{source.hub}",  # the Hub's, even where a local folder has the same name
            source.hub_config,
            revision=commit,
        )
        splits = {str(name): list(urls) for name, urls in (builder.config.data_files or {}).items()}
        if split not in splits:
            want = suggest_choice(split, splits) if splits else "a dataset of files"
            raise UserError(Problem(f"the dataset {source.hub} has no such split", repr(split), want, keys))
        system, root = get_file_system(f"hf://datasets/{source.hub}@{commit}")
        folders = {url.rpartition("/")[0] for url in splits[split]}
        sizes = {info["name"]: info["size"] for folder in sorted(folders) for info in system.ls(folder, detail=True)}
        paths = {url: url.removeprefix("hf://") for url in splits[split]}
        return [(path.removeprefix(f"{root}/"), url, sizes[path]) for url, path in paths.items()]
    except UserError:
        raise
    except Exception as error:  # as above
        want = f"a configuration and split that it has, or {OTHER_DATA}"
        raise UserError(
            Problem(f"the dataset {source.hub} cannot be read", exception_message(error), want, keys)
        ) from None


def ask_with_timeout(limit_s: float, ask: Callable[[], T]) -> T:
    """What `ask` returns or raises. Errors: TimeoutError after limit_s, even where a look-up of a name hangs."""
    said: queue.SimpleQueue[tuple[T] | Exception] = queue.SimpleQueue()

    def listen() -> None:
        try:
            said.put((ask(),))
        except Exception as error:  # it is raised again below
            said.put(error)

    threading.Thread(target=listen, daemon=True).start()
    try:
        answer = said.get(timeout=limit_s)
    except queue.Empty:
        raise TimeoutError(f"no answer within {limit_s:g} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer[0]


def has_hub_answered(error: Exception) -> bool:
    """Whether an error is the Hub's answer, rather than silence or a fault of its own."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def hub_problem(error: Exception, kind: str, name: str, key: str, way_out: str) -> Problem:
    """An error of huggingface_hub as a problem with the `kind` (tokenizer, dataset) of that name."""
    token = "HF_TOKEN is not accepted for it" if get_token() else "no HF_TOKEN"
    match error:
        case GatedRepoError():
            want = f"HF_TOKEN of an account that was granted access on its page, or {way_out}"
            return Problem(f"the {kind} {name} is gated", token, want, key)
        case RepositoryNotFoundError():
            what, want = f"the Hub has no {kind} {name}", f"its exact name (for a private one HF_TOKEN), or {way_out}"
            return Problem(what, f"not found, {token}", want, key)
    if has_hub_answered(error):
        return Problem(
            f"the Hub does not give the {kind} {name}", exception_message(error), f"an answer, or {way_out}", key
        )
    return Problem(
        "the Hugging Face Hub does not answer", exception_message(error), f"{constants.ENDPOINT}, or {way_out}", key
    )
