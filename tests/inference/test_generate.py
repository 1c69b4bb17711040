"""Sampling draws from the distribution it says, and generation feeds, stops and seeds as promised."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from smoltrain.config.schema import GenerationSection, ModelSection, TransformersSection
from smoltrain.errors import TrainingStopped, UserError
from smoltrain.inference.generate import decode_stream, generate_ids, sample_token
from smoltrain.model.build import build_model
from smoltrain.model.interface import LanguageModel
from smoltrain.model.transformers_model import HuggingFaceModel

PROMPT = [3, 1, 4, 1, 5]
PROBABILITIES = [0.15, 0.5, 0.05, 0.3]  # by size: ids 1, 3, 0, 2


def settings(
    *, max_tokens: int = 10, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> GenerationSection:
    return GenerationSection(max_tokens=max_tokens, temperature=temperature, top_k=top_k, top_p=top_p)


def counts(probabilities: Sequence[float], s: GenerationSection, draws: int = 4000) -> Counter[int]:
    generator, logits = torch.Generator().manual_seed(0), torch.tensor(probabilities).log()
    return Counter(sample_token(logits, s, False, generator) for _ in range(draws))


DECODER = ModelSection(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
    max_position_embeddings=32,
    dropout=0.1,
    initializer_range=0.2,
)
GPT2 = TransformersSection(
    kind="transformers",
    model_type="gpt2",
    vocab_size=40,
    max_position_embeddings=32,
    config={"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.1, "initializer_range": 0.2},
)


def fresh(section: ModelSection | TransformersSection) -> LanguageModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(section)


@pytest.fixture(scope="module", params=[DECODER, GPT2], ids=["decoder", "transformers"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return fresh(request.param)


def naive(model: LanguageModel, ids: list[int], count: int) -> list[int]:
    """Greedy generation without a cache."""
    ids = list(ids)
    model.eval()
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    model.train()
    return ids[-count:]


def test_greedy_is_the_argmax():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert sample_token(logits, settings(), True, torch.Generator()) == int(logits.argmax())


def test_top_k_of_one_is_greedy():
    for logits in (torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.zeros(100)):  # zeros: all tie
        assert sample_token(logits, settings(top_k=1), False, torch.Generator()) == int(logits.argmax())


def test_frequencies_follow_the_softmax():
    drawn = counts(PROBABILITIES, settings())
    for i, p in enumerate(PROBABILITIES):
        assert drawn[i] / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)  # four standard errors


def test_temperature_sharpens_and_flattens():
    want = torch.tensor(PROBABILITIES).log().div(0.5).softmax(0).tolist()
    drawn = counts(PROBABILITIES, settings(temperature=0.5))
    for i, p in enumerate(want):
        assert drawn[i] / 4000 == pytest.approx(p, abs=4 * (p * (1 - p) / 4000) ** 0.5)
    assert counts(PROBABILITIES, settings(temperature=100.0))[2] > 800  # of 1000 if flat, 200 at temperature 1


@pytest.mark.parametrize(("k", "kept"), [(1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (4, {0, 1, 2, 3}), (99, {0, 1, 2, 3})])
def test_top_k_keeps_the_likeliest(k: int, kept: set[int]):
    assert set(counts(PROBABILITIES, settings(top_k=k), 500)) == kept


@pytest.mark.parametrize(
    ("p", "kept"), [(1e-9, {1}), (0.49, {1}), (0.51, {1, 3}), (0.79, {1, 3}), (0.81, {0, 1, 3}), (0.96, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: set[int]):
    assert set(counts(PROBABILITIES, settings(top_p=p), 500)) == kept


def test_top_p_reached_exactly_adds_no_token():
    assert set(counts([0.25] * 4, settings(top_p=0.5), 500)) == {0, 1}


def test_top_p_counts_within_top_k():
    # Of ids 1 and 3 the first holds 0.5 / 0.8 = 0.625.
    assert set(counts(PROBABILITIES, settings(top_k=2, top_p=0.6), 500)) == {1}
    assert set(counts(PROBABILITIES, settings(top_k=2, top_p=0.65), 500)) == {1, 3}


def test_a_banned_token_is_never_drawn():
    drawn = counts([0.0, 0.5, 0.0, 0.5], settings(top_k=3), 500)  # probability 0 is a logit of -inf
    assert set(drawn) == {1, 3}


def test_the_cache_gives_what_the_whole_text_gives(model: LanguageModel):
    assert list(generate_ids(model, PROMPT, settings(), stop_ids=(), greedy=True)) == naive(model, PROMPT, 10)


def test_greedy_text_is_that_of_transformers():
    model = fresh(GPT2)
    assert isinstance(model, HuggingFaceModel)
    theirs = model.inner.eval().generate(
        torch.tensor([PROMPT]), attention_mask=torch.ones(1, 5), max_new_tokens=20, do_sample=False, pad_token_id=0
    )
    ours = list(generate_ids(model, PROMPT, settings(max_tokens=20), stop_ids=(), greedy=True))
    assert PROMPT + ours == theirs[0].tolist()
    assert len(set(ours)) > 3


def test_only_the_last_logits_are_made(model: LanguageModel):
    made: list[torch.Size] = []
    hook = model.register_forward_hook(lambda module, args, out: made.append(out.shape))
    list(generate_ids(model, PROMPT, settings(max_tokens=3), stop_ids=()))
    hook.remove()
    assert made == [(1, 1, 40)] * 3


def test_one_seed_one_text(model: LanguageModel):
    def text(seed: int) -> list[int]:
        return list(generate_ids(model, PROMPT, settings(max_tokens=20), stop_ids=(), seed=seed))

    assert text(7) == text(7)
    assert text(7) != text(8)


def test_it_stops_at_the_stop_token_and_does_not_yield_it(model: LanguageModel):
    whole = naive(model, PROMPT, 10)
    stop = whole[4]
    assert list(generate_ids(model, PROMPT, settings(), stop_ids=[stop], greedy=True)) == whole[: whole.index(stop)]


def test_banned_ids_are_avoided_but_the_stop_token_is_not(model: LanguageModel):
    first = naive(model, PROMPT, 1)[0]
    assert list(generate_ids(model, PROMPT, settings(), stop_ids=[first], banned_ids=[first], greedy=True)) == []
    banned = [i for i in range(40) if i not in (8, 9)]
    drawn = list(generate_ids(model, PROMPT, settings(max_tokens=25), stop_ids=(), banned_ids=banned))
    assert set(drawn) == {8, 9}
    assert first not in list(generate_ids(model, PROMPT, settings(), stop_ids=(), banned_ids=(first,), greedy=True))


@pytest.mark.parametrize(("prompt", "new"), [(5, 27), (30, 2), (31, 1)])
def test_it_stops_when_positions_are_used_up(model: LanguageModel, prompt: int, new: int):
    assert len(list(generate_ids(model, [1] * prompt, settings(max_tokens=99), stop_ids=()))) == new


@pytest.mark.parametrize(("prompt", "saw"), [([], "no tokens"), ([1] * 32, "32 tokens"), ([1] * 40, "40 tokens")])
def test_a_prompt_that_cannot_be_continued_is_refused_at_once(model: LanguageModel, prompt: list[int], saw: str):
    with pytest.raises(UserError) as error:
        generate_ids(model, prompt, settings(), stop_ids=())
    assert error.value.problems[0].saw == saw


def test_the_caller_finds_everything_as_it_was(model: LanguageModel):
    def state() -> tuple[bool, bool, Tensor]:
        return model.training, torch.is_grad_enabled(), torch.get_rng_state()

    for training in (True, False):
        model.train(training)
        before = state()
        ids = generate_ids(model, PROMPT, settings(), stop_ids=())
        for _ in range(3):  # also between two tokens, and when abandoned
            next(ids)
            training_now, grad_now, rng_now = state()
            assert (training_now, grad_now) == before[:2]
            assert torch.equal(rng_now, before[2])
    model.train()
    assert all(p.grad is None for p in model.parameters())


def read(ids: list[int]) -> str:
    """The text of ids that are bytes."""
    return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["", "plain", "é", "a🙂b🙂🙂", "tail \ufffd", "\ufffd\ufffdx", "日本"])
@pytest.mark.parametrize("prompt", ["", "Prompt 🙂"])
def test_text_is_told_whole_and_by_whole_characters(text: str, prompt: str):
    pieces = list(decode_stream(list(prompt.encode()), list(text.encode()), read))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert [piece for piece in pieces if piece] == list(text)


def test_a_character_that_never_ends_is_told_at_the_end():
    assert "".join(decode_stream([], b"a\xf0\x9f", read)) == "a\ufffd"


def test_temperature_0_is_greedy(model: LanguageModel):
    cold = list(generate_ids(model, PROMPT, settings(temperature=0, top_k=3, top_p=0.9), seed=5))
    assert cold == naive(model, PROMPT, 10)
    assert list(generate_ids(model, PROMPT, settings(temperature=5e-324), seed=5)) == cold, (
        "nor does it overflow near 0"
    )


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "said"), [(5, 27, False), (5, 28, True), (31, 1, False), (31, 9, True)]
)
def test_a_text_that_the_context_ends_says_so(model: LanguageModel, prompt: int, max_tokens: int, said: bool):
    told: list[str] = []
    count = len(list(generate_ids(model, [1] * prompt, settings(max_tokens=max_tokens), say=told.append)))
    line = f"the text stops where the context of 32 tokens ends: prompt {prompt}, new {count}"
    assert told == ([line] if said else [])
    first = naive(model, PROMPT, 1)
    list(generate_ids(model, PROMPT, settings(max_tokens=99), stop_ids=first, greedy=True, say=told.append))
    assert len(told) == said, "a text that ended by itself was not stopped"


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 1, 2**64, -(2**70)])
def test_a_seed_out_of_range(model: LanguageModel, seed: int):
    with pytest.raises(UserError, match=f"the seed is out of range: saw {seed}, want 0 to {2**63 - 1}"):
        generate_ids(model, PROMPT, settings(), seed=seed)
    assert list(generate_ids(model, PROMPT, settings(max_tokens=2), seed=2**63 - 1))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_that_are_no_numbers_end_it(model: LanguageModel, value: float, greedy: bool):
    hook = model.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([3]), value))
    try:
        with pytest.raises(TrainingStopped, match="its logits are not finite numbers"):
            list(generate_ids(model, PROMPT, settings(), greedy=greedy))
    finally:
        hook.remove()
