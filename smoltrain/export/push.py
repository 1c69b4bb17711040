"""A run on the Hugging Face Hub: its verified export, uploaded. The only importer of huggingface_hub's client.

The client takes its settings from the environment: HF_TOKEN (or the token that `hf auth login` keeps), HF_ENDPOINT.
"""

import json
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smoltrain.errors import Problem, UserError

HUB_TIMEOUT_S = (
    7.0  # for each address of the Hub, of which there may be two (IPv6, IPv4); the client itself would not end
)


def push_to_hub(source: str, repo: str, *, private: bool = True, say: Callable[[str], None] = print) -> str:
    """Upload the newest checkpoint of a run, exported now unless it is already, or an export; returns the URL.

    `repo` is OWNER/NAME, or NAME for one's own; it is created (private unless told otherwise) if it does not exist.
    Errors: UserError for a bad name, no token or a refused one, a Hub that cannot be reached or forbids it; those of
    `export`. The export stays, so that the same command goes on with the upload.
    """
    endpoint, token = _read_hub_settings(repo)
    _check_hub_token(endpoint, token)
    folder, marker = _find_or_make_export(source, say)
    step = "" if marker["step"] is None else f", step {marker['step']} of {marker['last_step']}"
    return _upload_export(folder, repo, token, private, f"{marker['run']}{step}, by smoltrain {marker['smoltrain']}")


def _read_hub_settings(repo: str) -> tuple[str, str]:
    """(URL, token) of the Hub. Errors: UserError for a bad name, a missing token, or a client that may not go out."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    wrong: list[Problem] = []
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        reason = str(error).partition(". ")[0].partition(": '")[0]
        wrong.append(
            Problem("this is no name of a repository", repr(repo), f"OWNER/NAME ({reason})", "the REPO argument")
        )
    token = get_token()
    if not token:
        want = "a token that may write (https://huggingface.co/settings/tokens)"
        wrong.append(Problem("there is no token for the Hub", "none", want, "HF_TOKEN, or `hf auth login`"))
    if constants.is_offline_mode():
        wrong.append(Problem("the Hub is switched off", "HF_HUB_OFFLINE=1", "it unset", "HF_HUB_OFFLINE"))
    if wrong:
        raise UserError(*wrong)
    return constants.ENDPOINT, token or ""


def _check_hub_token(endpoint: str, token: str) -> None:
    """Ask the Hub who the token is. Errors: UserError if it does not answer in time, or does not know the token."""
    try:
        request = urllib.request.Request(f"{endpoint}/api/whoami-v2", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return
    except urllib.error.HTTPError as error:
        raise _hub_refusal(error.code, _parse_hub_error(error.read()), endpoint, "the token") from None
    except (OSError, ValueError) as error:  # OSError: refused, no such host, timed out, TLS; ValueError: no URL
        reason = str(getattr(error, "reason", error))
        want = f"an answer within {HUB_TIMEOUT_S:g} s; the same command tries again"
        raise UserError(
            Problem("the Hub cannot be reached", reason, want, f"the network, or HF_ENDPOINT={endpoint}")
        ) from None


def _find_or_make_export(source: str, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """The verified export to upload and its marker: `source` itself, or that of a run's newest checkpoint.

    It is made now if it is not there yet, or was changed since.
    """
    from smoltrain.checkpoint.manifest import find_newest_valid_checkpoint
    from smoltrain.export.export import default_export_folder, export_model, is_verified_export, read_export_marker
    from smoltrain.inference.load import find_run_folder, is_huggingface_folder

    if is_huggingface_folder(Path(source)):
        folder = Path(source)
        if not is_verified_export(folder):
            want = f"a run, or a folder as `smoltrain export {shlex.quote(source)} OUT` writes it"
            raise UserError(Problem("the folder is no verified export", source, want, "the RUN argument"))
        return folder, read_export_marker(folder) or {}
    run = find_run_folder(source)
    manifest = find_newest_valid_checkpoint(run / "checkpoints", say)
    if manifest is not None:
        folder = default_export_folder(run, manifest.step)
        marker = read_export_marker(folder) or {}
        if marker.get("run_id") == manifest.wandb_id and is_verified_export(folder):
            say(f"export {folder} is verified already")
            return folder, marker
    folder = export_model(source, say=say)  # which says what is missing if there is no checkpoint
    return folder, read_export_marker(folder) or {}


def _upload_export(folder: Path, repo: str, token: str, private: bool, message: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi(token=token)
    try:
        created = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=created.repo_id, folder_path=folder, commit_message=message)
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        said = error.server_message or str(error).strip().splitlines()[-1]
        raise _hub_refusal(status, said, api.endpoint, repo) from None
    except Exception as error:  # of the network, whose library changes with the client's version
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        want = "it to last; the same command tries again, the export stays"
        raise UserError(Problem("the connection to the Hub broke", str(error), want, "the network")) from None
    return str(created)


def _hub_refusal(status: int, said: str, endpoint: str, what: str) -> UserError:
    """The Hub's answer in our form."""
    want = {401: "a token that it knows", 403: "a token that may write there"}.get(status, "an answer of 200")
    change = "HF_TOKEN, or `hf auth login`" if status in (401, 403) else "the REPO argument, or HF_ENDPOINT"
    return UserError(Problem(f"the Hub at {endpoint} refuses {what}", f"{status} {said}".strip(), want, change))


def _parse_hub_error(body: bytes) -> str:
    """What a JSON answer gives as its error."""
    try:
        told: Any = json.loads(body)
        return str(told["error"])
    except (ValueError, TypeError, KeyError):
        return ""
