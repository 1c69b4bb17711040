"""The checks of a config that no single field can make: each `yield` is a rule that is broken."""

from collections.abc import Iterator

from smoltrain.config.schema import (
    HORIZON_KEYS,
    Config,
    EngineSection,
    EvaluateSection,
    ModelSection,
    OptimizerSection,
    OwnModelSection,
    PhaseSection,
    SourceSection,
    TransformersSection,
)
from smoltrain.errors import Problem, suggest_choice

# Ids of the tokenizers that have no file to look into before they are fetched.
KNOWN_VOCAB_SIZES = {"gpt2": 50257, "tiktoken:gpt2": 50257, "smollm2": 49152}
MUON_KEYS = ("momentum", "newton_schulz_steps", "embedding_lr_factor")  # of optimizer, which mean nothing to adamw


def find_contradictions(c: Config) -> list[Problem]:
    """Every rule that the config breaks."""
    match c.model:
        case ModelSection():
            model = [*_check_decoder(c.model), *_check_cuda_graphs(c.engine)]
        case TransformersSection():
            model = _check_transformers_model(c.model, c)
        case OwnModelSection():
            model = _check_own_model_options(c)
    evaluation = _check_evaluation(c.evaluate)
    return [*model, *_check_batch_and_data(c), *_check_optimizer(c.optimizer), *_check_phases(c), *evaluation]


def _check_decoder(m: ModelSection) -> Iterator[Problem]:
    heads = m.num_attention_heads
    head_width = m.hidden_size // heads
    if m.hidden_size % heads:
        want = f"a multiple of model.num_attention_heads = {heads}"
        yield Problem("the heads do not divide the width", str(m.hidden_size), want, "model.hidden_size")
    if heads % m.num_key_value_heads:
        want = f"a divisor of model.num_attention_heads = {heads}"
        saw = str(m.num_key_value_heads)
        yield Problem("the key-value heads do not divide the heads", saw, want, "model.num_key_value_heads")
    if m.positions == "rope" and head_width % 2:
        what = "rotary positions need an even width per head"
        yield Problem(what, str(head_width), "an even number", "model.hidden_size")


def _check_cuda_graphs(e: EngineSection) -> Iterator[Problem]:
    if not e.cuda_graphs:
        return
    for key, value, want in (
        ("compile", e.compile, "on"),
        ("compile_region", e.compile_region, "model"),
        ("reduce_gradients", "step" if e.reduce_gradients == "auto" else e.reduce_gradients, "step"),
    ):
        if value != want:
            either = f"{want}; or engine.cuda_graphs=false"
            yield Problem("CUDA graphs need another region or reduction", value, either, f"engine.{key}")


def _check_transformers_model(m: TransformersSection, c: Config) -> Iterator[Problem]:
    for key in ("vocab_size", "max_position_embeddings", "model_type"):
        if key in m.config:
            here = f"model.config.{key}"
            yield Problem(f"{key} stands in the wrong place", here, f"model.{key}", here)
    if c.engine.gradient_checkpointing not in ("auto", "none", "full"):
        what, want = "a transformers model recomputes all blocks or none", "none or full"
        yield Problem(what, str(c.engine.gradient_checkpointing), want, "engine.gradient_checkpointing")
    for key, value, want in (
        ("loss", "fused", "auto"),
        ("compile", "on", "auto"),
        ("compile_region", "model", "block"),
        ("cuda_graphs", True, "false"),
        ("fused_projections", True, "false"),
    ):
        if getattr(c.engine, key) == value:
            saw = str(value).lower()
            yield Problem(f"a transformers model cannot have {key} {saw}", saw, want, f"engine.{key}")


def _check_own_model_options(c: Config) -> Iterator[Problem]:
    what = "nothing is known of a model of one's own"
    options = {
        "engine.gradient_checkpointing": (c.engine.gradient_checkpointing, "none"),
        "engine.compile": (c.engine.compile, "auto or off"),
        "engine.compile_region": (c.engine.compile_region, "block"),
        "engine.cuda_graphs": (str(c.engine.cuda_graphs).lower(), "false"),
        "engine.fused_projections": (str(c.engine.fused_projections).lower(), "false"),
        "engine.attention": (c.engine.attention, "auto"),
        "engine.loss": (c.engine.loss, "auto"),
    }
    for key, (value, want) in options.items():
        if str(value) not in want.split(" or "):
            yield Problem(f"{what}: {key.partition('.')[2]}", str(value), want, key)
    if c.batch.micro_batch == "auto":
        yield Problem(f"{what}, so no micro-batch can be estimated", "auto", "a number of rows", "batch.micro_batch")


def _check_batch_and_data(c: Config) -> Iterator[Problem]:
    b = c.batch
    t = c.tokenizer
    n = c.engine.gradient_checkpointing
    if isinstance(n, int) and n < 1:
        what = "gradient checkpointing of every n-th block"
        yield Problem(what, str(n), "n of at least 1", "engine.gradient_checkpointing")
    if b.sequence_length > c.model.max_position_embeddings:
        want = f"at most model.max_position_embeddings = {c.model.max_position_embeddings}"
        what = "the sequence is longer than the positions"
        yield Problem(what, str(b.sequence_length), want, "batch.sequence_length")
    if (b.accumulation is None) == (b.rows_per_step is None):
        saw = f"accumulation={b.accumulation}, rows_per_step={b.rows_per_step}"
        keys = "batch.accumulation or batch.rows_per_step"
        yield Problem("the batch is not given exactly once", saw, "one of the two", keys)
    if b.micro_batch == "auto" and b.rows_per_step is None:
        what, saw = "there is nothing to split into micro-batches", f"auto x {b.accumulation} accumulated"
        want, keys = "batch.rows_per_step, and accumulation null", "batch.rows_per_step or batch.micro_batch"
        yield Problem(what, saw, want, keys)
    yield from _check_sources(c)
    if c.init.source is None and c.init.load == "all":
        yield Problem("there is nothing to load all of", "init.from=null", "a run", "init.from or init.load")
    if (t.vocab_size is None) == (t.name == "bpe"):
        saw = f"name={t.name}, vocab_size={t.vocab_size}"
        want = "a vocab_size with name 'bpe', null with any other"
        yield Problem("tokenizer.vocab_size does not fit its name", saw, want, "tokenizer.vocab_size")
    if t.vocab_size is not None and t.vocab_size > c.model.vocab_size:
        what, want = "the embedding table cannot hold the tokenizer's ids", f"at least {t.vocab_size}"
        yield Problem(what, str(c.model.vocab_size), want, "model.vocab_size")
    num_ids = KNOWN_VOCAB_SIZES.get(t.name, 0) + (t.pad is not None)
    if t.name in KNOWN_VOCAB_SIZES and num_ids > c.model.vocab_size:
        what = "the tokenizer has more ids than the model"
        want = f"at most model.vocab_size = {c.model.vocab_size:,}"
        yield Problem(what, f"{num_ids:,}", want, "model.vocab_size or tokenizer")


def _check_sources(c: Config) -> Iterator[Problem]:
    """Where each source's documents come from, and that the phases mix sources that there are."""
    d = c.data
    names = [source.name for source in d.sources]
    own = [k for k, field in SourceSection.model_fields.items() if getattr(d, k) != field.default]
    if names and own:
        saw = ", ".join(f"{key}={getattr(d, key)}" for key in own)
        keys = " or ".join(f"data.{key}" for key in own)
        yield Problem("a source is described beside data.sources", saw, "each of them in its own entry", keys)
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("two sources share a name", name, "distinct names", f"data.sources.{name}.name")
    for source in d.parts:
        key = f"data.sources.{source.name}" if names else "data"
        given = {"package": source.package, "path": source.path, "hub": source.hub}
        if sum(value is not None for value in given.values()) != 1:
            saw = ", ".join(f"{kind}={value}" for kind, value in given.items())
            keys = " or ".join(f"{key}.{kind}" for kind in given)
            yield Problem("the data is not given exactly once", saw, "one of the three", keys)
        if source.validation_split is not None and source.hub is None:
            want, keys = "null; data.validation_path names files", f"{key}.validation_split"
            yield Problem("only a Hub dataset has splits", source.validation_split, want, keys)
        if source.validation_split is not None and source.validation_path is not None:
            saw, keys = f"{source.validation_split} and {source.validation_path}", f"{key}.validation_split"
            yield Problem("the validation data are given twice", saw, "one of the two", keys)
    for phase in c.phases:
        for name in sorted((phase.mix or {}).keys() - set(names)):
            want = suggest_choice(name, names) if names else "null: there is one source"
            yield Problem("the mix names no source", repr(name), want, f"phases.{phase.name}.mix")
        if phase.mix == {}:
            yield Problem("the mix is empty", "{}", "a weight by name, or null", f"phases.{phase.name}.mix")


def _check_optimizer(o: OptimizerSection) -> Iterator[Problem]:
    if o.kind == "muon":
        return
    for name in MUON_KEYS:
        value = getattr(o, name)
        default = OptimizerSection.model_fields[name].default
        if value != default:
            what = f"optimizer.{name} is of muon alone"
            want = f"{default} with {o.kind}, any with muon"
            yield Problem(what, f"{value} with {o.kind}", want, f"optimizer.{name} or optimizer.kind")


def _check_evaluation(e: EvaluateSection) -> Iterator[Problem]:
    if bool(e.tasks) != bool(e.tasks_every):
        saw = f"tasks=[{', '.join(e.tasks)}], tasks_every={e.tasks_every}"
        yield Problem("tasks and their cadence go together", saw, "both or none", "evaluate.tasks_every or tasks")
    if e.tasks_limit is not None and not e.tasks:
        yield Problem("there is no task to limit", str(e.tasks_limit), "null", "evaluate.tasks_limit or tasks")


def _check_phases(c: Config) -> Iterator[Problem]:
    names = [p.name for p in c.phases]
    if not names:
        yield Problem("there is no phase", "[]", "at least one", "phases")
        return
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Problem("two phases share a name", ", ".join(names), "distinct names", f"phases.{name}.name")
    stop = c.run.stop_after
    if stop is not None and stop not in names:
        yield Problem("run.stop_after names no phase", repr(stop), suggest_choice(stop, names), "run.stop_after")
    if c.phases[0].schedule == "continue":
        want, key = "a schedule of its own", f"phases.{names[0]}.schedule"
        yield Problem("the first phase has nothing to continue", "continue", want, key)
    for phase in c.phases:
        yield from _check_phase(phase)


def _check_phase(p: PhaseSection) -> Iterator[Problem]:
    key = f"phases.{p.name}"
    if (p.lr is None) != (p.schedule == "continue"):
        want = "null with schedule continue, a number with any other"
        yield Problem(f"{key}.lr does not fit its schedule", f"{p.lr} with {p.schedule}", want, f"{key}.lr")
    if p.schedule == "continue" and p.warmup_steps:
        yield Problem(f"{key} continues, so it cannot warm up", str(p.warmup_steps), "0", f"{key}.warmup_steps")
    if (p.decay_steps > 0) != (p.schedule == "wsd"):
        saw, want = f"{p.decay_steps} with {p.schedule}", "above 0 with wsd, 0 with any other"
        yield Problem(f"{key}.decay_steps does not fit its schedule", saw, want, f"{key}.decay_steps")
    if len(p.horizon) != 1:
        saw = ", ".join(f"{name}={value:g}" for name, value in p.horizon.items()) or "none of them"
        keys = " or ".join(f"{key}.{name}" for name in HORIZON_KEYS)
        yield Problem(f"{key} is not given its length exactly once", saw, "one of steps, tokens and epochs", keys)
    if p.steps is not None and p.warmup_steps + p.decay_steps > p.steps:  # of tokens and epochs: schedule.py
        saw, want = f"{p.warmup_steps} + {p.decay_steps}", f"at most {key}.steps = {p.steps}"
        yield Problem(f"{key} is shorter than its warm-up and decay", saw, want, f"{key}.steps")
    if p.final_lr and p.schedule in ("constant", "continue"):
        saw, want = f"{p.final_lr} with {p.schedule}", "a schedule that falls: linear, cosine or wsd"
        yield Problem(f"{key}.final_lr is never reached", saw, want, f"{key}.schedule")
    if p.lr is not None and p.final_lr > p.lr:
        want = f"at most {key}.lr = {p.lr}"
        yield Problem(f"{key} ends above its peak", str(p.final_lr), want, f"{key}.final_lr")
