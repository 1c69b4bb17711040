"""What makes a run that run and no other: which keys may differ at a later start, and how two configs differ.

A run's identity stands in two places: its config.yaml, and the manifest of every checkpoint, which is sealed.
"""

from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import TypedDict

from smoltrain.config.load import redacted_config
from smoltrain.config.older_keys import update_values
from smoltrain.config.schema import Config, SourceSection
from smoltrain.errors import Problem, UserError
from smoltrain.schedule import Plan, first_differing_step, plan_from_phases, step_settings

# What becomes of a difference in a key.
FIXED = "refused"  # the weights of the past depend on it: with another value it would be another run
FIXED_IN_PAST_STEPS = "refused for steps that are done"  # accepted, and printed, for those to come
ANNOUNCED = "accepted and printed"  # numbers may come out otherwise, or be measured otherwise, from here on
FIXED_ROWS = "refused unless the rows per step stay"  # two ways to say how many there are
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
    ("model", ANNOUNCED, "class_name"),  # of a program's own, whose weights have names and shapes of their own
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
    ("batch", FIXED, "sequence_length"),
    ("batch", FIXED_ROWS, "accumulation rows_per_step"),
    ("batch", ANNOUNCED, "micro_batch"),
    ("engine", ANNOUNCED, "device ds_config precision gradient_checkpointing attention reduce_gradients loss compile"),
    ("engine", ANNOUNCED, "compile_region cuda_graphs fused_projections"),
    ("engine", FREE, "hang_s lost_host_s"),
    ("optimizer", FIXED, "kind momentum newton_schulz_steps embedding_lr_factor"),
    ("optimizer", FIXED, "beta1 beta2 eps gradient_clipping z_loss"),
    (
        "phases.*",
        FIXED_IN_PAST_STEPS,
        "name steps tokens epochs lr weight_decay schedule warmup_steps decay_steps final_lr",
    ),
    ("phases.*", FIXED_IN_PAST_STEPS, "optimizer_state mix"),
    ("evaluate", ANNOUNCED, "every rows"),
    ("evaluate", FREE, "tasks tasks_every tasks_limit memorisation_every"),
    ("generation", FREE, "max_tokens temperature top_k top_p"),
    ("sample", FREE, "every prompts"),
    ("export", FREE, "license license_name language"),
    ("checkpoint", FREE, "every keep_last keep_every keep_best background shared"),
    ("spikes", ANNOUNCED, "on_spike deviations history window max_times"),
    ("track", FREE, "print_every gradients_every to wandb wandb_project wandb_entity wandb_id wandb_name wandb_group"),
    ("track", FREE, "wandb_tags wandb_job_type wandb_notes wandb_model wandb_code wandb_timeout_s"),
)
KEY_RULES = {f"{section}.{key}": rule for section, rule, keys in KEY_RULE_TABLE for key in keys.split()}
ABSENT = "nothing"  # in place of the value of a key that only one of two configs has
SOURCE_ORDER_KEY = "data.sources"  # the names of the sources, in order


class ConfigDifference(NamedTuple):
    """A dotted key that has another value in a later config."""

    key: str
    before: Any
    now: Any


class ForbiddenChange(NamedTuple):
    """A dotted key with another value than steps that are done were trained with."""

    key: str
    before: Any  # ABSENT where only the later config has it
    now: Any
    step: int | None  # the first step that would have been another one; None: all of them


class RunIdentity(TypedDict):
    """What a checkpoint's manifest says of its run."""

    run_id: str
    rows_per_step: int
    values: dict[str, Any]  # of the keys that are FIXED or FIXED_ROWS, by dotted key
    phases: list[dict[str, Any]]


def make_run_identity(config: Config, rows_per_step: int, run_id: str) -> RunIdentity:
    """The identity of a run with this config. It holds no path or URL."""
    values = _fixed_values(config)
    return RunIdentity(run_id=run_id, rows_per_step=rows_per_step, values=values, phases=_dump_phases(config))


def identity_of_run(config: Config, provenance: dict[str, Any]) -> RunIdentity:
    """The identity of the run whose config.yaml holds this config and this provenance."""
    return make_run_identity(config, provenance["rows_per_step"], provenance["run_id"])


def key_rule(key: str) -> str:
    """The rule of a dotted key: FIXED, FIXED_ROWS, FIXED_IN_PAST_STEPS, ANNOUNCED or FREE."""
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
    before = _flatten_config(old) | _flatten_phases(old, both)
    now = _flatten_config(new) | _flatten_phases(new, both)
    differing = [key for key in before | now if before.get(key) != now.get(key)]
    return [ConfigDifference(key, before.get(key), now.get(key)) for key in differing]


def format_differences(differences: list[ConfigDifference]) -> list[str]:
    """Each as `key: before -> now`."""
    return [f"{key}: {before!r} -> {now!r}" for key, before, now in differences]


def find_forbidden_changes(past: RunIdentity, new: Config, done: int, world_size: int = 1) -> list[ForbiddenChange]:
    """What keeps a config from going on with a run of which `done` steps are done: every key that must be taken back.

    Of the plan those keys alone by which a step that is done would have been trained otherwise. `world_size` ranks are
    to go on: whatever says the rows per step may say it in another way, if they stay as many.
    """
    before = update_values(past["values"])
    now = _fixed_values(new)
    keeps_rows = new.batch.rows(world_size) == past["rows_per_step"]
    changes: list[ForbiddenChange] = []
    for key in before | now:
        may_differ = new.data.allow_changed and _describes_documents(key)
        may_differ |= keeps_rows and key_rule(key) == FIXED_ROWS
        if before.get(key) != now.get(key) and not may_differ:
            changes.append(ForbiddenChange(key, before.get(key, ABSENT), now.get(key, ABSENT), None))
    return changes + _find_plan_changes(plan_from_phases(past["phases"]), Plan(new.phases), done)


def _find_plan_changes(past: Plan, new: Plan, done: int) -> list[ForbiddenChange]:
    """The keys of phases by which a step up to `done` differs; all with the first such step."""
    step = first_differing_step(past, new, 0)
    if step is None or step > done:
        return []
    names = [phase.name for phase in past.phases if phase.first <= done]
    new_names = [phase.name for phase in new.phases]
    if names != new_names[: len(names)]:
        return [ForbiddenChange("phases", [phase.name for phase in past.phases], new_names, step)]
    changes: list[ForbiddenChange] = []
    differing: list[ForbiddenChange] = []
    for index, name in enumerate(names):
        old_values = past.phases[index].spec.model_dump()
        new_values = new.phases[index].spec.model_dump()
        for key in [key for key in old_values if old_values[key] != new_values[key]]:
            change = ForbiddenChange(f"phases.{name}.{key}", old_values[key], new_values[key], step)
            differing.append(change)
            asked = _replace_value(past, index, key, new_values[key])
            taken_back = _replace_value(new, index, key, old_values[key])
            if _train_differently(past, asked, step, done) or _train_differently(new, taken_back, step, done):
                changes.append(change)
    return changes or differing


def _replace_value(plan: Plan, index: int, key: str, value: Any) -> Plan:
    """A plan with another value of one key; nothing checks that it fits the others."""
    phases = [phase.spec for phase in plan.phases]
    phases[index] = phases[index].model_copy(update={key: value})
    return Plan(tuple(phases))


def _train_differently(plan: Plan, other: Plan, step: int, done: int) -> bool:
    """Whether two plans differ at the ends of their phases, as far as they are done, or at `step`.

    Between, schedules are lines and cosines, which do not part and meet again. A plan with a learning rate that does
    not fit its schedule is no plan: what was replaced belongs to another key that differs.
    """
    phases = [*plan.phases, *other.phases]
    if any((phase.spec.lr is None) != (phase.spec.schedule == "continue") for phase in phases):
        return True
    steps = {step, *(min(end, done) for phase in phases for end in (phase.first, phase.last))}
    return any(step_settings(plan, at) != step_settings(other, at) for at in steps)


def find_identity_mismatches(own: RunIdentity, sealed: RunIdentity, step: int) -> list[str]:
    """Where a run's config.yaml (`own`) is not what its checkpoint of this step (`sealed`) says.

    Which documents there are is left out: data.allow_changed may have changed it since. So is how the recipe says the
    rows per step, which are compared themselves.
    """
    values = update_values(own["values"])
    sealed_values = update_values(sealed["values"])
    mismatches = [
        f"{key} is {values.get(key)!r}, not {sealed_values.get(key)!r}"
        for key in sealed_values | values
        if values.get(key) != sealed_values.get(key)
        and not (_describes_documents(key) or key.startswith(SOURCE_ORDER_KEY) or key_rule(key) == FIXED_ROWS)
    ]
    if own["rows_per_step"] != sealed["rows_per_step"]:
        mismatches.append(f"rows_per_step is {own['rows_per_step']}, not {sealed['rows_per_step']}")
    plan = plan_from_phases(own["phases"])
    sealed_plan = plan_from_phases(sealed["phases"])
    differing = first_differing_step(sealed_plan, plan, 0)
    if differing is not None and differing <= step:
        now = _describe_step(plan, differing)
        mismatches.append(f"step {differing} is {now}, not {_describe_step(sealed_plan, differing)}")
    return mismatches


def check_checkpoint_identity(sealed: RunIdentity, step: int, own: RunIdentity, path: Path) -> None:
    """Errors: UserError unless a checkpoint is its run's own, and says of it what its config.yaml at `path` says.

    `sealed` is the identity in the manifest of the checkpoint of `step`; `own` is that of config.yaml.
    """
    checkpoint = f"the checkpoint of step {step}"
    if own["run_id"] != sealed["run_id"]:
        want = f"{own['run_id']}, as in {path}"
        change = f"{path.parent / 'checkpoints'}; init.from and init.load=all go on from another run"
        raise UserError(Problem(f"{checkpoint} is another run's", f"run_id {sealed['run_id']}", want, change))
    mismatches = find_identity_mismatches(own, sealed, step)
    if mismatches:
        what = f"{path} does not agree with {checkpoint}"
        change = f"{path}; without it, the next start is held to the checkpoint and writes it anew"
        raise UserError(Problem(what, "; ".join(mismatches), "what the run wrote", change))


def _describes_documents(key: str) -> bool:
    """Whether a key of an identity says which documents there are, so that data.allow_changed frees it."""
    section, *_, name = key.split(".")
    return section == "data" and name in SourceSection.model_fields


def _describe_step(plan: Plan, step: int) -> str:
    return str(step_settings(plan, step) or "beyond the plan")


def _fixed_values(config: Config) -> dict[str, Any]:
    return {key: value for key, value in _flatten_config(config).items() if key_rule(key) in (FIXED, FIXED_ROWS)}


def _dump_phases(config: Config) -> list[dict[str, Any]]:
    """As plain values. A run's phases are in steps, so that the other two ways to say it are null, and left out."""
    return config.model_dump(mode="json", exclude={"phases": {"__all__": {"tokens", "epochs"}}})["phases"]


def _flatten_config(config: Config) -> dict[str, Any]:
    """Dotted key -> value of all but the phases; sources by name."""
    tree = redacted_config(config)
    del tree["phases"]
    sources = tree["data"].pop("sources")
    flat = _flatten_tree(tree, "") | {SOURCE_ORDER_KEY: [source["name"] for source in sources]}
    for source in sources:
        flat |= _flatten_tree(source, f"{SOURCE_ORDER_KEY}.{source['name']}.")
    return flat


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
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten_tree(value, f"{prefix}{key}.")
    return flat
