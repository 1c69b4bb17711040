"""What a recipe reads from elsewhere: its tokenizer, its data, the Hub, W&B. Nobody is asked whom it would not ask."""

import urllib.error
import urllib.request
from collections.abc import Iterable

from smoltrain.config.schema import Config
from smoltrain.doctor.check import Finding
from smoltrain.errors import exception_message

ANSWER_S = 6.0  # for a server


def check_tokenizer(config: Config) -> Finding:
    """The tokenizer as the run would have it; nothing large is downloaded. Errors: UserError."""
    from smoltrain.data.tokenizers.by_name import is_tokenizer_folder, load_named_tokenizer
    from smoltrain.data.tokenizers.packaged import ORIGINS, PACKAGED_TOKENIZERS, PACKAGES, packaged_tokenizer_folder
    from smoltrain.data.tokens.check_fit import check_vocab_size

    name = config.tokenizer.name
    if name == "bpe":
        return Finding("ok", "bpe, to be trained on the data")
    if name in PACKAGED_TOKENIZERS and not is_tokenizer_folder(str(packaged_tokenizer_folder(name))):
        saw = f"{name} is not made yet: the first start downloads the {ORIGINS[name].format(PACKAGES[name])}"
        return Finding("warning", saw, f"`smoltrain prepare tokenizer {name}`, where there is a network")
    tokenizer = load_named_tokenizer(config.tokenizer)
    check_vocab_size(tokenizer.num_ids, config)
    return Finding("ok", f"{name}, {tokenizer.num_ids:,} ids of {config.model.vocab_size:,} that the model has")


def check_data(config: Config) -> Finding:
    """Every source is listed, and the first record of its first file is read. Errors: UserError."""
    from smoltrain.data.documents.listing import list_all_sources
    from smoltrain.data.documents.readers import read_records
    from smoltrain.data.documents.records import BadRecord

    listed = list_all_sources(config)
    texts: list[str] = []
    for part in config.data.parts:
        shards = listed[part.name].shards
        records = read_records(shards[0], part, max_document_mib=config.data.max_document_mib)
        first = next(iter(records), None)
        records.close()
        if first is None or isinstance(first, BadRecord):
            why = "it has none" if first is None else first.why
            saw = f"the first record of {shards[0].place} cannot be read: {why}"
            return Finding("warning", saw, "look into the file; data.max_bad_share says how many may be bad")
        size = sum(shard.size or 0 for shard in shards)
        name = f"{part.name}: " if config.data.sources else ""
        texts.append(f"{name}{len(shards):,} files, {size / 2**20:,.1f} MiB")
    return Finding("ok", "; ".join(texts))


def check_hub(config: Config) -> Finding:
    """Whether the Hub answers, if the recipe takes something from it."""
    from smoltrain.data.documents.hub import HUB_ENDPOINT, describe_hub_access, is_hub_offline

    uses = list(list_hub_uses(config))
    if not uses:
        return Finding("ok", "not asked: the recipe takes nothing from it")
    what = ", ".join(uses)
    if is_hub_offline():
        return Finding("ok", f"not asked: HF_HUB_OFFLINE is set, {what} must be in the cache")
    answer = ask_server(HUB_ENDPOINT)
    if answer is not None:
        advice = "the network, HTTPS_PROXY or HF_ENDPOINT; without the Hub: HF_HUB_OFFLINE=1 and what the cache has"
        return Finding("fault", f"{HUB_ENDPOINT} does not answer, for {what}: {answer}", advice)
    return Finding("ok", f"{HUB_ENDPOINT} answers, for {what}; {describe_hub_access()}")


def list_hub_uses(config: Config) -> Iterable[str]:
    """Keys of the recipe that name something on the Hub."""
    from smoltrain.data.documents.hub import is_hub_repo_name
    from smoltrain.data.tokenizers.by_name import TOKENIZER_NAMES, is_tokenizer_folder

    name = config.tokenizer.name
    if name not in TOKENIZER_NAMES and not is_tokenizer_folder(name) and is_hub_repo_name(name):
        yield f"tokenizer {name}"
    for part in config.data.parts:
        if part.hub:
            yield f"data {part.hub}"


def check_wandb(config: Config) -> Finding:
    """Whether W&B's server answers, if the recipe or this machine's settings would log there."""
    from smoltrain.run.wandb_connection import find_wandb_server, resolve_wandb_mode

    mode, reason = resolve_wandb_mode(config)
    if mode != "online":
        return Finding("ok", f"not asked: {mode}, {reason}")
    server = find_wandb_server()
    answer = ask_server(server)
    if answer is not None:
        advice = "the network, HTTPS_PROXY or WANDB_BASE_URL; or track.wandb=offline, and `wandb sync` later"
        return Finding("warning", f"{server} does not answer: {answer}; a run would log offline", advice)
    return Finding("ok", f"{server} answers; online, {reason}")


def ask_server(url: str) -> str | None:
    """Why a server gives no answer within ANSWER_S; None if it does, whatever it says. Sends no name and no key."""
    if not url.startswith(("http://", "https://")):
        return "no http:// or https:// URL"
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": "smoltrain"})
    try:
        urllib.request.urlopen(request, timeout=ANSWER_S).close()
    except urllib.error.HTTPError as error:  # an answer
        error.close()
    except urllib.error.URLError as error:
        return exception_message(error.reason) if isinstance(error.reason, Exception) else str(error.reason)
    except (OSError, ValueError) as error:
        return exception_message(error)
    return None
