"""Which key is meant by a short one, by a word of another trainer, by a slip, and by an option."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smoltrain.config.keys import (
    expand_override,
    find_full_keys,
    list_keys,
    list_sections,
    read_key_options,
    suggest_key,
)
from smoltrain.config.load import RECIPES_FOLDER, load_config
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import UserError
from tests.config import mistaken_keys

EXAMPLE = str(Path(__file__).parents[1] / "example.yaml")
TREE = read_yaml(Path(EXAMPLE))
ONE_PHASE = TREE | {"phases": TREE["phases"][:1]}
LLAMA = read_yaml(RECIPES_FOLDER / "smollm2-135m-hf.yaml")
MIXED = TREE | {"data": {"sources": [{"name": "a", "path": "a"}, {"name": "b-2", "path": "b"}]}}
OWN = {"--ranks": True, "--device": True, "--plan": False, "-h": False, "--help": False}  # options of some verb


def refusal(*overrides: str, recipe: str = EXAMPLE) -> list[str]:
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    return [str(problem) for problem in caught.value.problems]


# --- all keys


@pytest.mark.parametrize("tree", [None, TREE, LLAMA, MIXED], ids=["schema", "example", "transformers", "mixed"])
def test_every_key_is_itself(tree: dict[str, Any] | None):
    keys = list_keys(tree)
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if find_full_keys(key, tree) != [key]] == []


def test_keys_are_those_of_the_recipe():
    assert {"phases.main.lr", "phases.continuation.lr", "model.hidden_size", "init.from"} <= set(list_keys(TREE))
    assert {"model.model_type", "model.config.hidden_size"} <= set(list_keys(LLAMA))
    assert "model.hidden_size" not in list_keys(LLAMA)
    assert {"data.sources.a.weight", "data.sources.b-2.weight"} <= set(list_keys(MIXED))
    assert {"phases.*.lr", "data.sources.*.weight", "model.hidden_size", "model.model_type"} <= set(list_keys())


def test_no_key_has_the_name_of_a_section():
    """Else `KEY=value` could mean either."""
    sections = list_sections()
    assert {key.rpartition(".")[2] for key in list_keys()} & set(sections[""]) == set()


# --- short keys


@pytest.mark.parametrize(
    ("short", "tree", "full"),
    [
        ("seed", TREE, ["run.seed"]),
        ("from", TREE, ["init.from"]),
        ("hidden_size", TREE, ["model.hidden_size"]),
        ("hidden_size", LLAMA, ["model.config.hidden_size"]),
        ("model.hidden_size", LLAMA, ["model.config.hidden_size"]),
        ("lr", ONE_PHASE, ["phases.main.lr"]),
        ("phases.lr", ONE_PHASE, ["phases.main.lr"]),
        ("continuation.lr", TREE, ["phases.continuation.lr"]),
        ("b-2.weight", MIXED, ["data.sources.b-2.weight"]),
        ("lr", TREE, ["phases.main.lr", "phases.continuation.lr"]),
        ("every", TREE, ["evaluate.every", "sample.every", "checkpoint.every"]),
        ("tokenizer", TREE, ["tokenizer"]),
        ("main", TREE, []),
        ("lr.main", TREE, []),
        ("run.lr", ONE_PHASE, []),
        ("", TREE, []),
    ],
)
def test_a_key_is_short_for_those_that_end_like_it(short: str, tree: dict[str, Any], full: list[str]):
    assert find_full_keys(short, tree) == full


def test_phases_that_are_not_there_are_named_by_a_star():
    assert find_full_keys("lr", {}) == ["phases.*.lr"]
    assert expand_override("lr=1", {}) == "lr=1"
    assert refusal("phases=[]", "lr=1")[0].startswith("unknown key lr: saw 'lr', want phases.*.lr=1; change lr on")


@pytest.mark.parametrize("override", ["seed", "=3", "lr=1", "nothing=1", "run.seed=2", "model.config.new=3"])
def test_what_is_short_for_nothing_stays_as_it_was(override: str):
    assert expand_override(override, TREE) == override


def test_a_short_override_is_recorded_by_its_full_key(tmp_path: Path):
    loaded = load_config(EXAMPLE, ["seed=7", "sequence_length=1_28", "wandb_project=x", "main.steps=1e3"])
    assert (loaded.run.seed, loaded.track.wandb_project, loaded.phases[0].steps) == (7, "x", 1000)
    assert load_config(EXAMPLE, ["run.seed=7"]) == load_config(EXAMPLE, ["seed=7"])
    data = load_config(EXAMPLE, ["path=mine.txt"]).data
    assert (data.path, data.package) == ("mine.txt", None), "as with data.path, the recipe's source makes room"
    (line,) = refusal("seed=x")
    assert line == "run.seed is not valid: saw 'x', want a whole number; change run.seed on the command line"


def test_a_short_key_of_the_only_phase(tmp_path: Path):
    text = Path(EXAMPLE).read_text(encoding="utf-8")
    before, _, after = text.partition("  - name: continuation")
    recipe = tmp_path / "one.yaml"
    recipe.write_text(before + after[after.index("evaluate:") :], encoding="utf-8")
    (phase,) = load_config(str(recipe), ["lr=1e-3", "phases.warmup_steps=10"]).phases
    assert (phase.lr, phase.warmup_steps) == (1e-3, 10)


@pytest.mark.parametrize("word", ["optimizer=muon", "optimizer='muon'", "kind=muon"])
def test_the_optimizers_name_is_short_for_its_kind_alone(tmp_path: Path, word: str):
    """What a recipe says of it beside stays; `kind` could be the model's too."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(Path(EXAMPLE).read_text(encoding="utf-8") + "optimizer: {beta2: 0.9}\n", encoding="utf-8")
    if word == "kind=muon":
        assert refusal(word, recipe=str(recipe))[0].startswith("kind is short for several keys")
        return
    optimizer = load_config(str(recipe), [word, "beta1=0.8"]).optimizer
    assert (optimizer.kind, optimizer.beta1, optimizer.beta2) == ("muon", 0.8, 0.9)
    assert load_config(str(recipe), {"optimizer": "muon"}).optimizer.kind == "muon"
    assert load_config(str(recipe), optimizer={"kind": "muon"}).optimizer.kind == "muon"


def test_a_whole_optimizer_may_still_be_given():
    optimizer = load_config(EXAMPLE, ["optimizer={kind: muon, momentum: 0.9}"]).optimizer
    assert (optimizer.kind, optimizer.momentum) == ("muon", 0.9)
    assert refusal("optimizer=Muon")[0].startswith("optimizer.kind is not valid: saw 'Muon', want 'adamw' or 'muon'")
    assert refusal("optimizer=")[0].startswith("optimizer is not valid: saw None")


def test_a_key_that_is_short_for_several_is_refused_with_all_of_them():
    assert refusal("lr=1e-3", "every=3", "phases.steps=5") == [
        "lr is short for several keys: saw 'lr', want phases.main.lr=1e-3 (and phases.continuation.lr=1e-3); "
        "change lr on the command line",
        "every is short for several keys: saw 'every', want one of evaluate.every=3, sample.every=3, "
        "checkpoint.every=3; change every on the command line",
        "phases.steps is short for several keys: saw 'phases.steps', want phases.main.steps=5 "
        "(and phases.continuation.steps=5); change phases.steps on the command line",
    ]


def test_a_file_spells_its_keys_in_full(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        Path(EXAMPLE).read_text(encoding="utf-8") + "seed: 7\nlr: 1e-3\ntraining: {steps: 5, seq_len: 9}\n"
    )
    assert refusal(recipe=str(recipe)) == [
        "unknown key seed: saw 'seed', want run.seed; change seed in mine.yaml",
        "unknown key lr: saw 'lr', want phases.main.lr (and phases.continuation.lr); change lr in mine.yaml",
        "unknown key training.steps: saw 'steps', want phases.main.steps (and phases.continuation.steps); "
        "change training.steps in mine.yaml",
        "unknown key training.seq_len: saw 'seq_len', want batch.sequence_length "
        "(and model.max_position_embeddings at least as long); change training.seq_len in mine.yaml",
    ]


# --- what was meant


@pytest.mark.parametrize(
    ("key", "value", "want"),
    [
        ("n_layer", "12", "model.num_hidden_layers=12"),
        ("N-Layer", "12", "model.num_hidden_layers=12"),
        ("model.n_layer", "12", "model.num_hidden_layers=12"),
        ("optimizer.lr", "1", "phases.main.lr=1 (and phases.continuation.lr=1)"),
        ("phases.continuation.learning_rate", "1", "phases.continuation.lr=1"),
        ("track.every", "1", "'print_every' (the nearest valid one)"),
        ("evaluate.steps", "50", "evaluate.every=50"),
        ("learning_rte", "1", "phases.main.lr=1 (and phases.continuation.lr=1)"),
        ("hiden_size", "1", "model.hidden_size=1"),
        ("dtype", "bfloat16", "engine.precision=bf16"),
        ("model_type", "gpt2", "model.model_type, with model.kind=transformers"),
        ("optimizer.name", "AdamW", "optimizer.kind=adamw"),
        ("optimizer.name", None, "optimizer.kind"),
        ("optimizer_type", "Muon", "optimizer.kind=muon"),
        ("optim", "adamw_torch", "optimizer.kind=adamw"),
        ("muon_momentum", "0.9", "optimizer.momentum=0.9"),
        ("ns_steps", "3", "optimizer.newton_schulz_steps=3"),
        (
            "embedding_lr",
            "0.3",
            "optimizer.embedding_lr_factor: this rate, divided by phases.main.lr (and phases.continuation.lr)",
        ),
        ("n_layer", None, "model.num_hidden_layers"),
        ("n_layer", "", "model.num_hidden_layers"),
        ("run_name", "two words", "run.name"),
        ("run_name", "x" * 100, "run.name"),
        (
            "nproc",
            None,
            "no key: --ranks N of `smoltrain train` (under torchrun --nproc-per-node), --world of `estimate`",
        ),
        ("zzz", "1", None),
        ("", "1", None),
    ],
)
def test_what_to_want_instead(key: str, value: object, want: str | None):
    assert suggest_key(key, TREE, value) == want


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("n_layer", "model.config.num_hidden_layers=2"),
        ("model.rope_theta", "model.config.rope_theta=2"),
        ("n_positions", "model.max_position_embeddings=2"),
        ("padded_vocab_size", "model.vocab_size=2"),
    ],
)
def test_a_model_of_transformers_has_its_shape_in_its_config(key: str, want: str):
    assert suggest_key(key, LLAMA, "2") == want


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("mdoel.norm=rmsnorm", "unknown key mdoel: saw 'mdoel', want 'model' (the nearest valid one)"),
        ("tokeniser=smollm2", "unknown key tokeniser: saw 'tokeniser', want 'tokenizer' (the nearest valid one)"),
        ("batchs=8", "unknown key batchs: saw 'batchs', want 'batch' (the nearest valid one)"),
        ("optim.beta1=0.8", "unknown key optim.beta1: saw 'beta1', want optimizer.beta1=0.8"),
        ("phase.main.lr=1", "unknown key phase: saw 'phase', want 'phases' (the nearest valid one)"),
        ("optim.x.beta1=0.8", "unknown key optim.x.beta1: saw 'beta1', want optimizer.beta1=0.8"),
        ("zzz=1", "unknown key zzz: saw 'zzz', want one of batch, checkpoint, data, "),
        ("zzz.yyy.xxx=1", "unknown key zzz.yyy.xxx: saw 'xxx', want one of batch, checkpoint, data, "),
    ],
)
def test_a_misspelt_section_is_known_by_what_stands_in_it(override: str, line: str):
    (found,) = refusal(override)
    assert found.startswith(line)


def test_a_key_in_two_words_of_another_trainer_is_one_problem_each():
    lines = refusal("training.steps=100", "training.local_batch_size=8", "optimizer.beta1=x")
    assert [line.partition(":")[0] for line in lines] == [
        "optimizer.beta1 is not valid",
        "unknown key training.steps",
        "unknown key training.local_batch_size",
    ]


def test_a_file_of_nothing_but_unknown_keys_is_answered_soon(tmp_path: Path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "".join(f"lr{number}: 1\n" for number in range(5000)) + f"x: {{{', '.join(f'b{i}: 1' for i in range(99))}}}"
    )
    lines = [line for line in refusal(recipe=str(recipe)) if line.startswith("unknown key")]
    assert len(lines) == 5001
    assert lines[7].startswith("unknown key lr7: saw 'lr7', want phases.*.lr")
    assert lines[77].startswith("unknown key lr77: saw 'lr77', want a key of a recipe; change lr77 in mine.yaml")


@settings(max_examples=25)
@given(key=st.text(st.sampled_from("abelnrst_.-*[]{}\n '\"é0"), max_size=12), value=st.text(max_size=5))
def test_whatever_is_typed_is_taken_or_refused_in_lines(key: str, value: str):
    try:
        load_config(EXAMPLE, [f"{key}={value}"])
    except UserError as error:
        problems = error.problems
        lines = str(error).splitlines()
    else:
        problems = lines = ()
    assert len(lines) == len(problems)


def test_the_answers_to_mistaken_keys_are_those_of_the_page():
    assert len(mistaken_keys.TYPED) >= 40
    page = mistaken_keys.PAGE.read_text(encoding="utf-8")
    assert page == mistaken_keys.write_page(), "anew: .venv/bin/python tests/config/mistaken_keys.py"


def test_what_the_page_wants_are_keys():
    """Each `key=value` of its answers can be typed."""
    tree = read_yaml(RECIPES_FOLDER / f"{mistaken_keys.RECIPE}.yaml")
    rows = [line for line in mistaken_keys.PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    wanted = {key for row in rows for key in re.findall(r"[a-z]\w*(?:\.\w+)+(?==)", row.split(" | ")[-1])}
    assert len(wanted) > 30
    assert [key for key in sorted(wanted) if find_full_keys(key, tree) != [key]] == []


# --- options


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("q --lr 1e-3", "q lr=1e-3"),
        ("q --lr=1e-3 --run.seed 7", "q lr=1e-3 run.seed=7"),
        ("q --weight-decay -1", "q weight_decay=-1"),
        ("q --data.sources.my-own.text-field body", "q data.sources.my-own.text_field=body"),
        ("q --wandb-notes=a=b", "q wandb_notes=a=b"),
        ("q --keep-best", "q keep_best=true"),
        ("q --keep-best false", "q keep_best=false"),
        ("--keep-best q", "q keep_best=true"),
        ("--lr 1e-3 --ranks 2 q a=1", "--ranks 2 q lr=1e-3 a=1"),
        ("--lr 1e-3", "lr=1e-3"),
        ("q --bf16 --max_steps 1e3", "q bf16=true max_steps=1e3"),
        ("q --bf16 run.seed=1", "q bf16=true run.seed=1"),
        ("q --compile --zzz", "q compile=true zzz=true"),
        ("q --zzz -h", "q zzz=true -h"),
        ("q a=1 --a 2 a=3", "q a=1 a=2 a=3"),
        ("q --ranks 2 --plan --help", "q --ranks 2 --plan --help"),
        ("q --ranks=2 --rank 3 --plans", "q --ranks=2 --rank 3 --plans"),
        ("q --device cpu --devices 2", "q --device cpu devices=2"),
        ("q -x 3 -- --lr 1", "q -x 3 -- --lr 1"),
        ("", ""),
    ],
)
def test_options_that_a_command_lacks_are_overrides(typed: str, words: str):
    assert read_key_options(typed.split(), OWN) == words.split()


def test_a_value_with_blanks_stays_one_word():
    assert read_key_options(["q", "--wandb-notes", "two words"]) == ["q", "wandb_notes=two words"]


@pytest.mark.parametrize("words", [["--lr"], ["--lr", "--seed", "7"], ["--lr", "run.seed=7"], ["--learning_rate"]])
def test_an_option_without_its_value_is_refused(words: list[str]):
    with pytest.raises(UserError, match=rf"^{words[0]} has no value: saw nothing behind it, want {words[0]}=VALUE"):
        read_key_options(words, OWN)
