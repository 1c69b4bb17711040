"""The five systems at their full shapes: two real ranks, ZeRO-2, both phases in processes of their own, an export."""

import json
import subprocess
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from smoltrain.config.load import load_config
from smoltrain.schedule import Plan
from tests import launches
from tests.data.documents.files import list_shards

# name -> parameters, as published; tokenizer out of a package; how the text is given; class on export
SYSTEMS = {
    "shakespeare-80m": (80_375_808, "smollm2", "text", "GPT2LMHeadModel"),
    "smollm2-135m": (134_515_008, "smollm2", "parquet", "LlamaForCausalLM"),
    "smollm2-124m": (123_571_200, "gpt2", "jsonl.zst", "GPTNeoXForCausalLM"),
    "smollm2-135m-hf": (134_515_008, "smollm2", "text", "LlamaForCausalLM"),
    "smollm-149m-mha": (149_629_248, "gpt2", "text", "SmoltrainForCausalLM"),
}
# Two steps and one more; everything else that is smaller than in the recipe is so for the sake of time.
SMALL = (
    "batch.sequence_length=64", "batch.micro_batch=1", "batch.accumulation=1", "data.validation_share=0.3",
    "phases.main.steps=2", "phases.main.warmup_steps=1", "phases.continuation.steps=1", "evaluate.rows=2",
    "generation.max_tokens=4", "track.gradients_every=0", "track.wandb=offline",
)  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_recipe_is_the_published_system(name: str):
    from smoltrain.model.build import build_model, count_parameters

    recipe = load_config(name)
    assert count_parameters(build_model(recipe.model, device="meta")) == SYSTEMS[name][0]
    micro_steps = 4 if name == "smollm2-135m-hf" else 1  # which counted those
    plan = Plan(recipe.phases)
    assert [phase.last for phase in plan.phases] == [
        5000 // micro_steps,
        5000 // micro_steps + (13 if micro_steps > 1 else 50),
    ]


def text(folder: Path, kind: str) -> Path:
    """Some plays, in the form in which the recipe's data would come."""
    found = list_shards(load_config("quickstart").data)[:12]
    plays = [Path(shard.url).read_text(encoding="utf-8")[:4000] for shard in found]
    folder.mkdir()
    if kind == "text":
        (folder / "input.txt").write_text("\n\n".join(plays), encoding="utf-8")
        return folder / "input.txt"
    if kind == "parquet":
        pq.write_table(pa.table({"text": plays}), folder / "train-00000-of-00001.parquet")
    else:
        lines = "".join(json.dumps({"text": play}) + "\n" for play in plays)
        with pa.CompressedOutputStream(str(folder / "shard.jsonl.zst"), "zstd") as file:
            file.write(lines.encode())
    return folder


def smoltrain(folder: Path, *words: str) -> str:
    """The real command; what it printed."""
    own = launches.environment() | {"SMOLTRAIN_THREADS": "1", "WANDB_DATA_DIR": str(folder)}
    done = subprocess.run(
        [str(launches.BIN / "smoltrain"), *words], capture_output=True, text=True, check=False, cwd=folder, env=own
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n == "shakespeare-80m" else pytest.mark.long) for n in SYSTEMS]
)
def test_the_whole_system_trains_resumes_and_exports(name: str, tmp_path: Path):
    num_parameters, tokenizer, kind, exported = SYSTEMS[name]
    words = [name, f"tokenizer={tokenizer}", f"data.path={text(tmp_path / 'text', kind)}", *SMALL]
    said = smoltrain(tmp_path, "train", *words)
    run = tmp_path / "runs" / name
    if name == "smollm-149m-mha":  # its continuation has a folder of its own
        assert not (run / "checkpoints" / "step-00000003").exists()
        run = run.with_name("continued")
        said += smoltrain(
            tmp_path, "train", *words, "run.name=continued", f"init.from={name}", "init.load=all", "run.stop_after=null"
        )
        assert "goes on from step 2 (phase main)" in said
    assert f"{num_parameters:,}" in said
    assert "restored step 2 on 2 ranks" in said
    assert ("bf16, fp16 was asked for" in said) == (name == "shakespeare-80m")
    metrics = [line for line in launches.metrics(run) if "train/lr" in line]
    assert metrics[-1]["step"] == 3
    said = smoltrain(tmp_path, "export", str(run), str(tmp_path / "out"))
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert about["architectures"] == [exported]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    if exported == "GPTNeoXForCausalLM":  # whose MLP has biases, here all zero
        count -= 12 * (3072 + 768)
    assert count == num_parameters
    seconds, peak = (max(line[key] for line in metrics) for key in ("speed/step_s", "memory/peak_gib"))
    print(f"\n{name}: {seconds:.1f} s a step, peak {peak:.1f} GiB a rank; {said}")
