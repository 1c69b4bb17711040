"""What makes a run that run and no other: which keys may differ at a later start, and how two configs differ.

A run is held to its identity in two places: its config.yaml, and the manifest of every checkpoint, which is sealed.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import TypedDict

from smoltrain.config.config_file import read_provenance
from smoltrain.config.load import read_run_config, redacted_config
from smoltrain.config.schema import Config, PhaseSection, SourceSection
from smoltrain.errors import Problem, UserError
from smoltrain.schedule import Plan, StepSettings, first_differing_step, step_settings

if TYPE_CHECKING:
    from smoltrain.checkpoint.manifest import Manifest

FIXED = "refused"  # the weights of the past depend on it: with another value it would be another run
FIXED_IN_PAST_STEPS = "refused for steps that are done"  # accepted, and printed, for those to come
ANNOUNCED = "accepted and printed"  # numbers may come out otherwise, or be measured otherwise, from here on
FREE = "free"  # nothing that was learned depends on it; config.yaml records it all the same

# Every key of the schema, once. `*` stands for the name of a source or phase.
KEY_RULE_TABLE = (
    ("run", FIXED, "seed"),
    ("run", FREE, "name recipe folder stop_after"),
    ("init", FREE, "from load"),  # of a new run folder alone
    ("model", FIXED, "kind vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads"),
    ("model", FIXED, "intermediate_size max_position_embeddings norm rms_norm_eps positions rope_theta mlp"),
    ("model", FIXED, "attention_bias mlp_bias tie_word_embeddings dropout attention_dropout initializer_range"),
    ("model", FIXED, "model_type config"),
    ("tokenizer", FIXED, "name vocab_size separator pad"),
    # The files themselves are compared by their fingerprint, wherever they lie now.
    ("data", ANNOUNCED, "path validation_path cache mode streams allow_changed"),
    ("data", FREE, "patience_s max_bad_records max_bad_share"),
    ("data", FIXED, "package hub hub_config hub_split pattern text_field documents document_separator"),
    ("data", FIXED, "validation_split validation_share shuffle_rows max_document_mib"),
    ("data.sources.*", ANNOUNCED, "path validation_path"),
    ("data.sources.*", FIXED, "name weight package hub hub_config hub_split pattern text_field documents"),
    ("data.sources.*", FIXED, "document_separator validation_split"),
    ("packing", FIXED, "document_mask"),
    ("batch", FIXED, "sequence_length accumulation rows_per_step"),
    ("batch", ANNOUNCED, "micro_batch"),
    ("engine", ANNOUNCED, "device ds_config precision gradient_checkpointing attention reduce_gradients loss compile"),
    ("engine", FREE, "hang_s"),
    ("optimizer", FIXED, "name beta1 beta2 eps gradient_clipping z_loss"),
    (
        "phases.*",
        FIXED_IN_PAST_STEPS,
        "name steps lr weight_decay schedule warmup_steps decay_steps final_lr optimizer_state mix",
    ),
    ("evaluate", ANNOUNCED, "every rows"),
    ("generation", FREE, "max_tokens temperature top_k top_p"),
    ("sample", FREE, "every prompts"),
    ("checkpoint", FREE, "every keep_last keep_every keep_best background"),
    ("spikes", ANNOUNCED, "on_spike deviations history window max_times"),
    ("track", FREE, "print_every gradients_every wandb wandb_project wandb_entity wandb_id wandb_name wandb_group"),
    ("track", FREE, "wandb_tags wandb_notes wandb_model wandb_timeout_s"),
)
KEY_RULES = {f"{section}.{key}": rule for section, rule, keys in KEY_RULE_TABLE for key in keys.split()}
# Keys that are newer than some runs, with the value that every run had before; older manifests lack them.
NEWER_KEYS = {"optimizer.name": "adamw"}
SOURCE_ORDER_KEY = "data.sources"  # the names of the sources, in order
ConfigDifference = tuple[str, Any, Any]  # dotted key, value before, value now


class RunIdentity(TypedDict):
    """What a checkpoint's manifest says of its run."""

    run_id: str
    rows_per_step: int
    values: dict[str, Any]  # of the keys that are refused, by dotted key
    phases: list[dict[str, Any]]


def make_run_identity(config: Config, rows_per_step: int, run_id: str) -> RunIdentity:
    """The identity of a run with this config. It holds no path or URL."""
    values = {key: value for key, value in _flatten_config(config).items() if key_rule(key) == FIXED}
    return RunIdentity(run_id=run_id, rows_per_step=rows_per_step, values=values, phases=_dump_phases(config))


def key_rule(key: str) -> str:
    """What becomes of a difference in this dotted key."""
    parts = key.split(".")
    if parts[0] == "phases":
        return FIXED_IN_PAST_STEPS
    if parts[:2] == ["data", "sources"]:
        return KEY_RULES[f"data.sources.*.{parts[-1]}"] if len(parts) > 3 else FIXED
    return KEY_RULES[".".join(parts[:2])]


def is_announced(key: str) -> bool:
    """Whether a difference in this key is printed at the start."""
    return key_rule(key) != FREE


def find_config_differences(old: Config, new: Config) -> list[ConfigDifference]:
    """Wherever two configs differ; a phase or source that only one of them has is one difference."""
    both = {phase.name for phase in old.phases} & {phase.name for phase in new.phases}
    was, now = _flatten_config(old) | _flatten_phases(old, both), _flatten_config(new) | _flatten_phases(new, both)
    return [(key, was.get(key), now.get(key)) for key in {**was, **now} if was.get(key) != now.get(key)]


def format_differences(changed: list[ConfigDifference]) -> list[str]:
    """Each as `key: before -> now`."""
    return [f"{key}: {was!r} -> {now!r}" for key, was, now in changed]


def find_forbidden_changes(was: RunIdentity, new: Config, done: int, change: str) -> list[Problem]:
    """What keeps a config from going on with a run of which so many steps are done; `change` says where to mend it."""
    before, now = NEWER_KEYS | was["values"], make_run_identity(new, 0, "")["values"]
    freed = set(SourceSection.model_fields) if new.data.allow_changed else set()
    problems = [
        Problem(f"{key} differs from the run's own", repr(now.get(key)), repr(before.get(key)), change)
        for key in {**before, **now}
        if before.get(key) != now.get(key) and not (key.startswith("data.") and key.split(".")[-1] in freed)
    ]
    past, asked = _plan_from_identity(was), Plan(new.phases)
    if asked.last_step < done:
        return [*problems, Problem("the plan ends in the past", f"{asked.last_step} steps", f"{done} or more", change)]
    if step := _first_differing_step(past, asked, done):
        saw, want = _describe_step(step_settings(asked, step)), _describe_step(step_settings(past, step))
        problems.append(Problem(f"the plan changes step {step}, which is done", saw, want, f"phases. {change}"))
    return problems


def find_identity_mismatches(was: RunIdentity, sealed: RunIdentity, step: int) -> list[str]:
    """Where a run's config.yaml is not what its checkpoint of this step says.

    Which documents there are is left out: data.allow_changed may have changed it since.
    """
    freed = {f"data.{key}" for key in SourceSection.model_fields} | {SOURCE_ORDER_KEY}
    before, own = NEWER_KEYS | sealed["values"], NEWER_KEYS | was["values"]
    keys = [key for key in {**before, **own} if key not in freed and not key.startswith("data.sources.")]
    found = [f"{key} is {own.get(key)!r}, not {before.get(key)!r}" for key in keys if own.get(key) != before.get(key)]
    if was["rows_per_step"] != sealed["rows_per_step"]:
        found.append(f"rows_per_step is {was['rows_per_step']}, not {sealed['rows_per_step']}")
    past, own_plan = _plan_from_identity(sealed), _plan_from_identity(was)
    if other := _first_differing_step(past, own_plan, step):
        now = _describe_step(step_settings(own_plan, other))
        then = _describe_step(step_settings(past, other))
        found.append(f"step {other} is {now}, not {then}")
    return found


def _first_differing_step(past: Plan, asked: Plan, done: int) -> int:
    """The first of the steps 1 to `done` that two plans do not have in common; 0 if there is none."""
    first = first_differing_step(past, asked, 0)
    return first if first is not None and first <= done else 0


def _describe_step(at: StepSettings) -> str:
    if at is None:
        return "beyond the plan"
    name, lr, decay, reset, mix = at
    more = (", optimizer reset" if reset else "") + (f", mix {mix}" if mix else "")
    return f"phase {name}, lr {lr:g}, weight decay {decay:g}{more}"


def _plan_from_identity(identity: RunIdentity) -> Plan:
    return Plan(tuple(PhaseSection.model_validate(phase) for phase in identity["phases"]))


def _dump_phases(config: Config) -> list[dict[str, Any]]:
    return config.model_dump(mode="json")["phases"]


def _flatten_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all but the phases; sources by name."""
    tree = redacted_config(config)
    del tree["phases"]
    sources = tree["data"].pop("sources")
    named = {
        key: value
        for source in sources
        for key, value in _flatten_tree(source, f"{SOURCE_ORDER_KEY}.{source['name']}.").items()
    }
    return _flatten_tree(tree, "") | {SOURCE_ORDER_KEY: [source["name"] for source in sources]} | named


def _flatten_phases(config: Config, both: set[str]) -> dict[str, Any]:
    """Dotted key -> value of the phases that are in both configs; any other one in a few words."""
    flat: dict[str, Any] = {}
    for phase in _dump_phases(config):
        name = phase["name"]
        if name in both:
            flat |= {f"phases.{name}.{key}": value for key, value in phase.items()}  # a mix as a whole
        else:
            flat[f"phases.{name}"] = f"{phase['steps']} steps, {phase['schedule']}"
    return flat


def _flatten_tree(tree: Any, prefix: str) -> dict[str, Any]:
    if isinstance(tree, dict):
        return {k: v for key, value in tree.items() for k, v in _flatten_tree(value, f"{prefix}{key}.").items()}
    return {prefix.rstrip("."): tree}


def check_checkpoint_identity(manifest: "Manifest", path: Path) -> None:
    """Errors: UserError unless a checkpoint is its run's own, and says of it what the run's config.yaml does."""
    old, provenance = read_run_config(path), read_provenance(path)
    was = make_run_identity(old, provenance["rows_per_step"], provenance["run_id"])
    sealed, of_step = manifest.identity, f"the checkpoint of step {manifest.step}"
    if was["run_id"] != sealed["run_id"]:
        change = f"{path.parent / 'checkpoints'}; init.from and init.load=all go on from another run"
        what, saw = f"{of_step} is another run's", f"run_id {sealed['run_id']}"
        raise UserError(Problem(what, saw, f"{was['run_id']}, as in {path}", change))
    if wrong := find_identity_mismatches(was, sealed, manifest.step):
        change = f"{path}; without it, the next start is held to the checkpoint and writes it anew"
        what, saw = f"{path} does not agree with {of_step}", "; ".join(wrong)
        raise UserError(Problem(what, saw, "what the run wrote", change))
