"""What is typed by who comes from another trainer, and the answer; written to docs/results/mistaken-keys.md by

.venv/bin/python tests/config/mistaken_keys.py
"""

import textwrap
from pathlib import Path

from smoltrain.config.keys import expand_override, read_key_options
from smoltrain.config.load import RECIPES_FOLDER, load_config
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "results" / "mistaken-keys.md"
RECIPE = "quickstart"  # two phases, main and continuation; a decoder
# What is typed -> who says so.
TYPED = {
    "steps=100": "torchtitan", "lr=1e-3": "everybody", "seed=7": "everybody", "weight_decay=0.01": "everybody",
    "warmup_steps=5": "Trainer", "wandb_project=mine": "nanoGPT", "sequence_length=64": "everybody",
    "temperature=0.7": "everybody", "every=10": "a guess", "name=first": "a guess", "--lr 1e-3": "argparse",
    "--weight-decay=0.01": "argparse", "--seed 7": "argparse", "--phases.main.lr 1e-3": "torchtitan",
    "--keep-best": "a flag", "--no-keep-best": "argparse", "--bf16": "Trainer",
    "phases.lr=1e-3": "a guess", "main.lr=1e-3": "a guess",
    "optimizer.lr=1e-3": "torchtitan", "training.steps=100": "torchtitan", "train.max_tokens=3e9": "litgpt",
    "epochs=3": "everybody", "num_train_epochs=3": "Trainer", "max_steps=100": "Trainer", "max_iters=100": "nanoGPT",
    "batch_size=8": "nanoGPT", "per_device_train_batch_size=8": "Trainer", "gradient_accumulation_steps=4": "Trainer",
    "global_batch_size=64": "litgpt", "total_batch_size=524288": "nanochat", "block_size=256": "nanoGPT",
    "context_length=64": "everybody", "n_layer=2": "nanoGPT", "n_head=4": "nanoGPT", "n_embd=128": "nanoGPT",
    "d_model=128": "papers", "model.n_layer=2": "nanoGPT", "model.hiden_size=128": "a slip", "hiden_size=128": "a slip",
    "intermediate_sise=256": "a slip", "mdoel.norm=rmsnorm": "a slip", "learning_rate=1e-3": "Trainer",
    "learning_rte=1e-3": "a slip", "phases.main.learning_rate=1e-3": "Trainer", "min_lr=1e-5": "nanoGPT",
    "warmup_ratio=0.03": "Trainer", "warmup_iters=5": "nanoGPT", "lr_decay_iters=100": "nanoGPT",
    "lr_scheduler_type=constant_with_warmup": "Trainer", "adam_beta1=0.9": "Trainer", "adam_epsilon=1e-8": "Trainer",
    "optimizer.name=adamw": "torchtitan", "optimizer_type=Muon": "DeepSpeed", "optimizer=muon": "everybody",
    "muon_momentum=0.95": "Megatron", "ns_steps=5": "modded-nanogpt", "matrix_lr=0.02": "nanochat",
    "embedding_lr=0.3": "nanochat",
    "max_grad_norm=1.0": "Trainer", "grad_clip=1.0": "nanoGPT", "optim=adamw_torch": "Trainer", "bf16=true": "Trainer",
    "dtype=bfloat16": "nanoGPT", "compile=true": "nanoGPT", "torch_compile=true": "Trainer",
    "gradient_checkpointing=true": "Trainer", "attn_implementation=flash_attention_2": "transformers",
    "zero_stage=2": "DeepSpeed", "eval_interval=50": "nanoGPT", "eval_steps=50": "Trainer", "save_steps=50": "Trainer",
    "save_total_limit=3": "Trainer", "logging_steps=5": "Trainer", "resume_from_checkpoint=true": "Trainer",
    "init_from=resume": "nanoGPT", "overwrite_output_dir=true": "Trainer", "output_dir=out": "Trainer",
    "out_dir=out": "nanoGPT", "run_name=first": "Trainer", "report_to=wandb": "Trainer", "wandb_log=true": "nanoGPT",
    "dataset_name=roneneldan/TinyStories": "Trainer", "train_file=mine.txt": "Trainer", "nproc_per_node=2": "torchrun",
    "num_gpus=2": "DeepSpeed", "push_to_hub=true": "Trainer", "max_new_tokens=50": "transformers",
    "batch.accumulation=1e1": "a number", "phases.main.steps=10k": "a number", "phases.main.steps=1.5": "a number",
    "--config mine.yaml": "litgpt", "--help": "everybody", "zzz=1": "nobody",
}  # fmt: skip


def answer(typed: str) -> str:
    """What becomes of an override: the key that it sets, or what the error wants instead."""
    (override,) = read_key_options(typed.split())
    try:
        load_config(RECIPE, [override])
    except UserError as error:
        return "; ".join(f"want {problem.want}" for problem in error.problems)
    return f"accepted: {expand_override(override, read_yaml(RECIPES_FOLDER / f'{RECIPE}.yaml'))}"


def write_page() -> str:
    """The page as it stands in the repository."""
    answers = {typed: answer(typed) for typed in TYPED}
    accepted = sum(text.startswith("accepted") for text in answers.values())
    what = (
        f"What `smoltrain train {RECIPE}` answers to {len(TYPED)} keys that are typed by habit: {accepted} are taken "
        "for the one key that they can mean. The others end with code 2 and one line; the part of it that says what to "
        "write instead stands here. Written by"
    )
    rows = [f"| `{typed}` | {TYPED[typed]} | {text} |" for typed, text in answers.items()]
    return f"""# Keys as other trainers call them

{textwrap.fill(what, 100)}

```sh
.venv/bin/python tests/config/mistaken_keys.py
```

| typed | known from | answer |
|---|---|---|
{chr(10).join(rows)}
"""


if __name__ == "__main__":
    PAGE.write_text(write_page(), encoding="utf-8")
