"""What the engine sends: by hand, and as two gloo ranks really call it."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from smoltrain.config.load import DS_CONFIGS_FOLDER
from smoltrain.estimate.traffic import list_collectives, overlapped_seconds
from smoltrain.estimate.training_setup import TrainingSetup
from tests import tiny
from tests.collective_bytes import CollectiveBytes
from tests.engines import ROWS, Odd, T, V
from tests.estimate.setups import SMOL, make_setup, sent_bytes_per_step
from tests.ranks import world


def setup_of(stage: int, by: str, device: str = "cuda", accumulation: int = 4) -> TrainingSetup:
    words = (f"engine.ds_config=zero{stage}", f"engine.reduce_gradients={by}", f"batch.accumulation={accumulation}")
    return make_setup(*words, "batch.rows_per_step=null", recipe=SMOL, world=8, device=device)


@pytest.mark.parametrize(("stage", "by", "bytes_per_parameter"), [
    (2, "step", 4 + 2),  # reduce-scatter in fp32, all-gather in bf16
    (1, "auto", 2 * 4 + 2),  # DeepSpeed's BF16_Optimizer: all-reduce, once
    (2, "micro_batch", 4 * 2 * 4 + 2),  # an all-reduce after each of four
    (3, "auto", 4 * 4 + 4 * 2),  # a reduce-scatter each; gathered once each, as the reuse is near; norms aside
])  # fmt: skip
def test_bytes_of_a_step_by_hand(stage: int, by: str, bytes_per_parameter: int):
    setup = setup_of(stage, by)
    N = setup.shape.parameters
    assert sent_bytes_per_step(setup) == pytest.approx(bytes_per_parameter * N * 7 / 8, rel=1e-3)
    assert sent_bytes_per_step(dataclasses.replace(setup, world=1)) == 0


def test_gloo_reduce_scatters_by_an_all_reduce():
    setup = dataclasses.replace(setup_of(2, "step"), device="cpu")
    N = setup.shape.parameters
    assert sent_bytes_per_step(setup) == pytest.approx((2 * 4 + 2) * N * 7 / 8)
    assert sent_bytes_per_step(setup, shared_memory=True) == pytest.approx((4 + 2) * N * 7 / 8)


@pytest.mark.parametrize(("stage", "by", "measured"), [
    (2, "step", 10.5e6), (2, "micro_batch", 35.6e6), (3, "auto", 40.8e6),
])  # fmt: skip
def test_bytes_are_those_that_two_hosts_were_seen_to_send(stage: int, by: str, measured: float):
    """2 million parameters, four micro-batches, counted at the network interfaces, TCP's headers included."""
    setup = dataclasses.replace(setup_of(stage, by), device="cpu", world=2)
    shape = dataclasses.replace(setup.shape, parameters=2_000_000, hidden_matrices=((1000, 1900),), vocabulary=1)
    sent = sent_bytes_per_step(dataclasses.replace(setup, shape=shape))
    assert 1.0 < measured / sent < 1.06


def test_zero3_gathers_twice_what_is_released_in_between():
    setup = setup_of(3, "auto", accumulation=1)
    large = dataclasses.replace(setup, shape=dataclasses.replace(setup.shape, parameters=10**9))
    once, half = (next(c for c in list_collectives(case) if c.what == "weights") for case in (setup, large))
    assert half.num_bytes == 1.5 * once.num_bytes, "of 1e9 parameters, half lies further than 1e9 elements away"


def test_overlap_is_only_where_the_engine_overlaps():
    def with_zero(setup: TrainingSetup, **settings: object) -> TrainingSetup:
        tree = dict(setup.ds_config)
        tree["zero_optimization"] = {**tree["zero_optimization"], **settings}
        return dataclasses.replace(setup, ds_config=tree)

    by_micro_batch = setup_of(2, "micro_batch")
    assert overlapped_seconds(by_micro_batch, 3.0, 2.0) == 0, "smoltrain's configs have it off"
    overlapping = with_zero(by_micro_batch, overlap_comm=True)
    assert overlapped_seconds(overlapping, 3.0, 2.0) == 0, "one bucket takes all gradients, and is sent at the end"
    buckets = with_zero(overlapping, reduce_bucket_size=overlapping.shape.parameters // 4 + 1)
    assert overlapped_seconds(buckets, 3.0, 2.0) == 2.0 * 3 / 4
    assert overlapped_seconds(buckets, 1.0, 2.0) == 1.0 * 3 / 4
    assert overlapped_seconds(dataclasses.replace(buckets, once_per_step=True), 3.0, 2.0) == 0


# --- as two ranks call it


def count_collectives(folder: Path, by: str) -> dict[str, int]:
    """Bytes of each kind of collective that the third step of an engine calls; runs on every rank."""
    import torch

    from smoltrain.data.rows.batch import Batch
    from smoltrain.engine import shared_tensor
    from smoltrain.engine.build_engine import build_engine

    counts = CollectiveBytes()
    settings = tiny.load(folder, f"engine.ds_config={folder / 'ds.json'}", "engine.precision=bf16",
        f"engine.reduce_gradients={by}", "batch.micro_batch=1", "track.gradients_every=0")  # fmt: skip
    accumulation = ROWS // world().size
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_tensor, "_reserve_shared_memory", lambda _: None)  # as on two machines
        model = Odd()
        places = model.places.detach().bfloat16()
        del model.places  # frozen, which the estimate knows nothing of
        model.register_buffer("places", places)
        engine = build_engine(model, settings, world(), precision="bf16", accumulation=accumulation)
        for step in range(3):  # ZeRO-3 knows the order of its modules after a step
            with counts if step == 2 else torch.enable_grad():
                ids = torch.randint(V, (ROWS, T + 1), generator=torch.Generator().manual_seed(step))
                for row in ids[world().rank :: world().size]:
                    engine.backward(engine.forward(Batch(row[None].int())) / (ROWS * T))
                engine.update(lr=1e-2, weight_decay=0.1)
    return dict(counts.whole)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "by"), [(2, "step"), (1, "auto"), (2, "micro_batch"), (3, "auto")])
def test_two_ranks_call_what_is_listed(ranks: Any, tmp_path: Path, stage: int, by: str):
    tree = json.loads((DS_CONFIGS_FOLDER / f"zero{stage}.json").read_text())
    tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 12} if stage == 3 else {}  # norms
    (tmp_path / "ds.json").write_text(json.dumps(tree))
    counted = ranks(2).run(count_collectives, tmp_path, by)[0]
    setup = setup_of(stage, by, accumulation=ROWS // 2)
    shape = dataclasses.replace(setup.shape, parameters=147, hidden_matrices=((7, 5), (5, 7)), vocabulary=V, width=5)
    setup = dataclasses.replace(setup, shape=shape, ds_config=setup.ds_config | tree | {"bf16": {"enabled": True}})
    listed: Counter[str] = Counter()
    for collective in list_collectives(setup):
        listed[collective.kind] += int(collective.repetitions * collective.num_bytes)
    names = {"all-reduce": "allreduce_", "reduce-scatter": "_reduce_scatter_base_", "all-gather": "_allgather_base_"}
    for kind, name in names.items():  # a tenth more and 20 bytes: padding of so small a model's parts, norm and flags
        assert listed[kind] <= counted.get(name, 0) <= 1.1 * listed[kind] + 20, (kind, counted, listed)
