"""The plain loop in which ideas are tried."""

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import small_loop
from benchmarks.small_loop import Trial
from tests import tiny


def make_trial_model(folder: Path, trial: Trial) -> nn.Module:
    torch.manual_seed(0)
    return small_loop.make_model(trial, tiny.load(folder))


def test_muon_is_that_of_torch_but_for_the_rounding_of_bf16():
    torch.manual_seed(0)
    shapes = [(32, 32), (16, 32), (48, 32)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    muon = small_loop.make_muon(ours, momentum=0.9, newton_schulz_steps=4)
    options = {"momentum": 0.9, "ns_steps": 4, "nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, **options)
    muon.param_groups[0].update(lr=0.01, weight_decay=0.1)
    for _ in range(3):
        before = [weight.detach().clone() for weight in ours]
        for weight, other in zip(ours, theirs, strict=True):
            weight.grad = torch.randn(weight.shape)
            other.grad = weight.grad.clone()
        muon.step()
        reference.step()
        for weight, other, old in zip(ours, theirs, before, strict=True):
            assert (weight - other).norm() < 0.02 * (weight - old).norm()


@pytest.mark.parametrize(
    ("trial", "shares"),
    [
        (Trial(steps=100, warmup_steps=10), (0.1, 1.0, 0.55, 0.1)),
        (Trial(steps=100, warmup_steps=10, schedule="linear", final_share=0.0), (0.1, 1.0, 0.5, 0.0)),
        (Trial(steps=100, warmup_steps=10, schedule="wsd", decay_share=0.4, final_share=0.0), (0.1, 1.0, 1.0, 0.0)),
    ],
    ids=lambda value: value.schedule if isinstance(value, Trial) else "",
)
def test_the_learning_rate_at_the_beginning_after_warm_up_half_way_and_at_the_end(trial: Trial, shares: tuple[float]):
    places = ((0, 0.0), (10, 0.1), (55, 0.55), (100, 1.0))
    assert [small_loop.lr_share(trial, *place) for place in places] == pytest.approx(shares)


def test_an_idea_changes_its_own_part_of_the_model_alone(tmp_path: Path):
    base = make_trial_model(tmp_path, Trial()).state_dict()
    scaled = make_trial_model(tmp_path, Trial(embedding_std=0.1)).state_dict()
    zeroed = make_trial_model(tmp_path, Trial(residual_scale=0.0)).state_dict()
    assert {name for name in base if not torch.equal(base[name], scaled[name])} == {"embed_tokens.weight"}
    assert torch.allclose(scaled["embed_tokens.weight"], 5 * base["embed_tokens.weight"])
    changed = {name for name in base if not torch.equal(base[name], zeroed[name])}
    assert changed == {name for name in base if "o_proj" in name or "down_proj" in name}
    assert not any(zeroed[name].any() for name in changed)


def test_queries_and_keys_of_every_head_are_normalised(tmp_path: Path):
    model = make_trial_model(tmp_path, Trial(qk_norm=True))
    found = [module for module in model.modules() if isinstance(module, small_loop.HeadNorm)]
    assert len(found) == 2 * 2
    queries = found[0](torch.randn(1, 3, 4 * found[0].head_width))
    root_mean_squares = queries.unflatten(-1, (4, -1)).square().mean(-1).sqrt()
    assert torch.allclose(root_mean_squares, torch.ones(1, 3, 4), atol=1e-3)


def test_every_parameter_has_one_optimizer(tmp_path: Path):
    for trial in (Trial(), Trial(optimizer="adamw"), Trial(tied=False, qk_norm=True)):
        model = make_trial_model(tmp_path, trial)
        optimizers = small_loop.make_optimizers(trial, model)
        held = [weight for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]]
        assert sorted(map(id, held)) == sorted(map(id, model.parameters()))
        assert len(optimizers) == (1 if trial.optimizer == "adamw" else 2)


def test_a_trial_learns_and_counts_its_updates(tmp_path: Path):
    words = tiny.words(tmp_path)
    short = small_loop.train_trial(Trial(rows=4, steps=1, lr=1e-6, warmup_steps=1), 1, words)
    long = small_loop.train_trial(Trial(rows=4, steps=12, warmup_steps=2, ramp_share=0.5), 1, words)
    assert long["validation"] < short["validation"] - 0.3
    assert long["updates"] == 12 + 6, "half of the tokens came in steps of half the rows"
