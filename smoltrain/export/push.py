"""A run on the Hugging Face Hub: its verified export, uploaded. The only module that writes to the Hub.

The client takes its settings from the environment: HF_TOKEN (or the token that `hf auth login` keeps), HF_ENDPOINT.
It is imported late, and so is torch: a refusal of the Hub should not wait for either.
"""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from smoltrain.errors import Problem, UserError

HUB_TIMEOUT_S = 7.0  # for each address of the Hub, as IPv6 and IPv4; left to itself the client would not end
NETWORK_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests")  # which of them, is the client's version


def push_to_hub(source: str, repo: str, *, private: bool = True) -> str:
    """Upload the newest checkpoint of a run, exported now unless it is already, or an export; returns the URL.

    `repo` is OWNER/NAME, or NAME for one's own; it is created (private unless told otherwise) if it does not exist.
    Errors: UserError for a bad name, no token or a refused one, a Hub that cannot be reached or forbids it; those of
    `export_model`. The export stays, so that the same command goes on with the upload.
    """
    endpoint, token = _read_hub_settings(repo)
    _check_hub_token(endpoint, token)
    folder, marker = _find_or_make_export(source, print)
    step = "" if marker["step"] is None else f", step {marker['step']} of {marker['last_step']}"
    message = f"{marker['run']}{step}, by smoltrain {marker['smoltrain']}"
    return _upload_export(folder, repo, endpoint, token, private, message)


def _read_hub_settings(repo: str) -> tuple[str, str]:
    """(URL, token) of the Hub. Errors: UserError for a bad name, a missing token, or a client that may not go out."""
    from huggingface_hub import constants, get_token

    from smoltrain.data.documents.hub import hub_name_problem

    problems: list[Problem] = []
    if problem := hub_name_problem(repo, "repository", "the REPO argument"):
        problems.append(problem)
    token = get_token()
    if not token:
        want = "a token that may write (https://huggingface.co/settings/tokens)"
        problems.append(Problem("there is no token for the Hub", "none", want, "HF_TOKEN, or `hf auth login`"))
    if constants.is_offline_mode():
        problems.append(Problem("the Hub is switched off", "HF_HUB_OFFLINE=1", "it unset", "HF_HUB_OFFLINE"))
    if problems:
        raise UserError(*problems)
    return constants.ENDPOINT, token or ""


def _check_hub_token(endpoint: str, token: str) -> None:
    """Ask the Hub who the token is. Errors: UserError if it does not answer in time, or does not know the token."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    headers = {"Authorization": f"Bearer {token}"}
    with _as_user_errors(endpoint, "the token"):
        hf_raise_for_status(get_session().get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=HUB_TIMEOUT_S))


def _find_or_make_export(source: str, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The verified export to upload and its marker: `source` itself, or that of a run's newest checkpoint.

    It is made now if it is not there yet, or was changed since.
    """
    from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint
    from smoltrain.export.marker import default_export_folder, is_card_behind, read_export_marker, read_verified_marker
    from smoltrain.inference.find_run import find_run_folder, is_huggingface_folder

    if is_huggingface_folder(Path(source)):
        marker = read_verified_marker(Path(source))
        if marker is None:
            want = f"a run, or a folder as `smoltrain export {shlex.quote(source)} OUT` writes it"
            raise UserError(Problem("the folder is no verified export", source, want, "the RUN argument"))
        return Path(source), marker
    run = find_run_folder(source, "the folder of a run or of an export")
    manifest = find_newest_valid_checkpoint(run / "checkpoints", say)
    if manifest is not None:
        folder = default_export_folder(run, manifest.step)
        marker = read_verified_marker(folder)
        if marker is not None and marker["run_id"] == manifest.wandb_id:
            say(f"export {folder} is verified already")
            if is_card_behind(run, manifest.step, folder):
                anew = f"`smoltrain export {shlex.quote(source)}` writes it anew"
                say(f"its card lacks what was measured of step {manifest.step} since: {anew}, with the options it had")
            return folder, marker
    from smoltrain.export.export import export_model

    folder = export_model(source, say=say)  # which says what is missing if there is no checkpoint
    marker = read_export_marker(folder)
    assert marker is not None, "export_model writes one"
    return folder, marker


def _upload_export(folder: Path, repo: str, endpoint: str, token: str, private: bool, message: str) -> str:
    """Create the repository if it is missing, upload what it does not have yet; returns its URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _as_user_errors(endpoint, repo):
        api = HfApi(endpoint=endpoint, token=token)
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
        return str(created)


@contextmanager
def _as_user_errors(endpoint: str, what: str) -> Iterator[None]:
    """The client's errors as UserErrors: the Hub refuses `what`, or the network fails."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        answer = error.server_message or str(error).strip().splitlines()[-1]
        want = {401: "a token that it knows", 403: "a token that may write there"}.get(status, "an answer of 200")
        change = "HF_TOKEN, or `hf auth login`" if status in (401, 403) else "the REPO argument, or HF_ENDPOINT"
        refusal = f"the Hub at {endpoint} refuses {what}"
        raise UserError(Problem(refusal, f"{status} {answer}".strip(), want, change)) from None
    except Exception as error:  # of the network, whose library changes with the client's version
        if type(error).__module__.partition(".")[0] not in NETWORK_LIBRARIES:
            raise
        want = f"an answer within {HUB_TIMEOUT_S:g} s, and a connection that lasts; the same command tries again"
        change = f"the network, or HF_ENDPOINT={endpoint}"
        raise UserError(Problem("the Hub cannot be reached", str(error), want, change)) from None
