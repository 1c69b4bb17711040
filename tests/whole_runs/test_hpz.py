"""ZeRO++'s secondary shards (hpZ): weights of ZeRO-3 are gathered within two ranks, as within a node, not over four."""

import json
from pathlib import Path

import pytest

from smoltrain.errors import DONE
from tests import launches, tiny
from tests.zygote import zygote

pytestmark = pytest.mark.slow


def test_it_trains_resumes_and_changes_over_bit_for_bit_as_zero_3(tmp_path: Path) -> None:
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    hpz = tmp_path / "hpz.json"
    hpz.write_text(json.dumps(config))

    def train(folder: Path, ds_config: str, *words: str) -> Path:
        folder.mkdir(exist_ok=True)
        life = zygote().train(tiny.words(folder, f"engine.ds_config={ds_config}", *words), 4, folder / "log")
        assert life.end() == [DONE] * 4, life.text()
        return folder / "runs" / "quickstart"

    own = train(tmp_path / "own", str(hpz), "run.stop_after=main")
    own = train(tmp_path / "own", str(hpz))
    plain = train(tmp_path / "plain", "zero3", "run.stop_after=main")
    plain = train(tmp_path / "plain", str(hpz))
    assert launches.losses(own) == launches.losses(plain)
    assert launches.weights_digest(own, 12) == launches.weights_digest(plain, 12)
