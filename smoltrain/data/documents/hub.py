"""Read from the Hugging Face Hub: its names, which files a dataset has, and how the Hub is asked. Nothing is written.

HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and the cache work as huggingface_hub documents them. It would try a Hub that is
out of reach for half a minute, so what is asked first (`ask_hub`) is asked once and with a limit; what then lists the
files of a dataset has none.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from smoltrain.config.schema import SourceSection
from smoltrain.data.documents.file_systems import get_file_system
from smoltrain.errors import Problem, UserError, exception_message, format_value, problem_from_system, suggest_choice
from smoltrain.files import describe_error
from smoltrain.timeout import call_with_timeout

Answer = TypeVar("Answer")
HUB_ANSWER_TIMEOUT_S = 8.0  # for each first question
HUB_ENDPOINT = constants.ENDPOINT  # HF_ENDPOINT, or the Hub itself
OTHER_DATA = "data.path=FOLDER of .parquet or .jsonl.zst files"


def ask_hub(question: Callable[[], Answer]) -> Answer:
    """What a first question to the Hub returns. Errors: those of huggingface_hub; TimeoutError."""
    return call_with_timeout(question, HUB_ANSWER_TIMEOUT_S)


def is_hub_repo_name(name: str) -> bool:
    """Whether a name has the form OWNER/NAME, as the Hub allows it: a/.. is a folder, NAME alone a word of ours."""
    return name.count("/") == 1 and hub_name_problem(name, "repository", "") is None


def hub_name_problem(name: str, kind: str, key: str) -> Problem | None:
    """Why a `kind` (dataset, repository) of the Hub cannot have this name; None if it can.

    A NAME alone is for the Hub to understand: a dataset of before there were owners, or a repository of one's own.
    """
    want = "OWNER/NAME, which is the end of its page's URL"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason, *_ = re.split(r"(?<!\.)\. |: '", str(error))  # its first sentence, without the name
        if name.count("/") <= 1:
            want = f"OWNER/NAME as the Hub allows it ({reason})"
        return Problem(f"no {kind} of the Hub can have this name", format_value(name), want, key)
    return None


def fetch_dataset_commit(data: SourceSection) -> str:
    """The commit (sha) at which the dataset stands now. Errors: UserError if there is none that this token may read."""
    name = str(data.hub)
    if problem := hub_name_problem(name, "dataset", "data.hub"):
        raise UserError(problem)
    api = HfApi()

    def fetch() -> str:
        api.auth_check(name, repo_type="dataset")  # all may read what a gated dataset is called, but not its rows
        return str(api.dataset_info(name).sha)

    try:
        return ask_hub(fetch)
    except Exception as error:  # of the library, of its HTTP client, of the system: there is no common base
        raise UserError(hub_problem(error, "dataset", name, "data.hub", OTHER_DATA)) from None


def list_dataset_files(
    source: SourceSection, split: str, commit: str, key: str, change: str
) -> list[tuple[str, str, int]]:
    """The files of the dataset's configuration and split at that commit: path in it, hf:// URL with the commit, bytes.

    No data is downloaded. `key` is the config's section of the source, `change` its keys that choose the files.
    Errors: UserError if the dataset has no such configuration or split, or cannot be listed.
    """
    try:
        import datasets
    except ImportError:
        want = f"`pip install datasets`, or {OTHER_DATA}"
        raise UserError(Problem("a package is missing to read the Hub", "no datasets", want, f"{key}.hub")) from None
    try:
        datasets.disable_progress_bars()  # which would be drawn over ours
        # hf:// is the Hub's, even where a local folder has the same name.
        name = f"hf://datasets/{source.hub}"
        builder = datasets.load_dataset_builder(name, source.hub_config, revision=commit)
        splits = {str(split_name): list(urls) for split_name, urls in (builder.config.data_files or {}).items()}
        if split not in splits:
            want = suggest_choice(split, splits) if splits else "a dataset of files"
            raise UserError(Problem(f"the dataset {source.hub} has no such split", repr(split), want, change))
        return _list_sizes(f"hf://datasets/{source.hub}@{commit}", splits[split])
    except UserError:
        raise
    except Exception as error:  # as above
        if (problem := _find_cache_problem(error)) is not None:
            raise UserError(problem) from None
        what = f"the dataset {source.hub} cannot be read"
        want = f"a configuration and split that it has, or {OTHER_DATA}"
        raise UserError(Problem(what, exception_message(error), want, change)) from None


def _list_sizes(dataset: str, urls: list[str]) -> list[tuple[str, str, int]]:
    """(path in the dataset, URL, bytes) of each URL, with one question for each folder."""
    system, root = get_file_system(dataset)
    sizes: dict[str, int] = {}
    for folder in sorted({url.rpartition("/")[0] for url in urls}):
        for info in system.ls(folder, detail=True):
            sizes[info["name"]] = info["size"]
    files: list[tuple[str, str, int]] = []
    for url in urls:
        path = url.removeprefix("hf://")
        files.append((path.removeprefix(f"{root}/"), url, sizes[path]))
    return files


def is_hub_offline() -> bool:
    """Whether HF_HUB_OFFLINE keeps the Hub from being asked."""
    return constants.is_offline_mode()


def describe_hub_access() -> str:
    """By what right it is read."""
    return "with a token" if get_token() else "without a token, as no HF_TOKEN is set"


def has_hub_answered(error: Exception) -> bool:
    """Whether an error is the Hub's answer, rather than silence or a fault of its own."""
    return isinstance(error, HfHubHTTPError) and error.response.status_code < 500


def hub_problem(error: Exception, kind: str, name: str, key: str, way_out: str) -> Problem:
    """An error of huggingface_hub as a problem with the `kind` (tokenizer, dataset) of that name."""
    token = "HF_TOKEN is not accepted for it" if get_token() else "no HF_TOKEN"
    if isinstance(error, GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        want = f"HF_TOKEN of an account that was granted access on its page, or {way_out}"
        return Problem(f"the {kind} {name} is gated", token, want, key)
    if isinstance(error, RepositoryNotFoundError):
        want = f"its exact name (for a private one HF_TOKEN), or {way_out}"
        return Problem(f"the Hub has no {kind} {name}", f"not found, {token}", want, key)
    if (problem := _find_cache_problem(error)) is not None:
        return problem
    saw = exception_message(error)
    if has_hub_answered(error):
        return Problem(f"the Hub does not give the {kind} {name}", saw, f"an answer, or {way_out}", key)
    return Problem("the Hugging Face Hub does not answer", saw, f"{constants.ENDPOINT}, or {way_out}", key)


def _find_cache_problem(error: Exception) -> Problem | None:
    """What keeps a download from being written where huggingface_hub keeps it; None where that is not what is wrong."""
    problem = problem_from_system(error) if isinstance(error, OSError) else None
    if problem is None:
        return None
    change = "HF_HOME, or what fills its disk"
    return replace(
        problem, what="the cache of the Hugging Face Hub cannot be used", saw=describe_error(error), change=change
    )
