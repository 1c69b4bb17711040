"""litgpt's own pretraining (litgpt.pretrain.setup), with its torch.compile, on smoltrain's decoder shape.

Its GPT has no learned positions and no dropout: shapes with the former get rotary positions on a quarter of a head, as
its GPT-NeoX models do, and the latter is left out.
"""

import math
from typing import Any

import torch
from litgpt import pretrain  # pyright: ignore[reportMissingImports]
from litgpt.args import EvalArgs, TrainArgs  # pyright: ignore[reportMissingImports]
from litgpt.config import Config  # pyright: ignore[reportMissingImports]
from litgpt.data import DataModule  # pyright: ignore[reportMissingImports]
from peer import (
    ACCUMULATION,
    LRS,
    MICRO_BATCH,
    STEPS,
    TASK,
    VALIDATE_EVERY,
    exit_at_once,
    find_validation_batch,
    load_task_rows,
    load_validation_rows,
    write_step_line,
    write_validation_line,
)
from torch.utils.data import DataLoader

SHAPE = TASK["shape"]
PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}
NORMS = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}
MLPS = {"swiglu": "LLaMAMLP", "gelu": "GptNeoxMLP"}
OWN_SCHEDULES = ("cosine", "constant")  # from 0 on, in micro-batches: at most a step from smoltrain's


class TaskDataModule(DataModule):
    """The task's rows of T + 1 ids, which litgpt shifts itself."""

    def connect(self, *, batch_size: int, **_: Any) -> None:
        """Called by litgpt, which tells the micro-batch."""
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader:
        """All rows, in the order of the steps."""
        return DataLoader(load_task_rows(), batch_size=self.batch_size)  # pyright: ignore[reportArgumentType]

    def val_dataloader(self) -> DataLoader:
        """What is validated on; else one micro-batch, with which litgpt checks itself at the start."""
        rows_NS = load_validation_rows() if VALIDATE_EVERY else load_task_rows()[: self.batch_size]
        return DataLoader(rows_NS, batch_size=find_validation_batch(len(rows_NS)))  # pyright: ignore[reportArgumentType]


def make_litgpt_config(sequence_length: int) -> Config:
    """litgpt's words for the decoder."""
    return Config(
        name="bench", block_size=sequence_length, vocab_size=SHAPE["vocab_size"],
        padded_vocab_size=SHAPE["vocab_size"], n_layer=SHAPE["num_hidden_layers"],
        n_head=SHAPE["num_attention_heads"], n_query_groups=SHAPE["num_key_value_heads"],
        n_embd=SHAPE["hidden_size"], intermediate_size=SHAPE["intermediate_size"],
        rotary_percentage=1.0 if SHAPE["positions"] == "rope" else 0.25, rope_base=int(SHAPE["rope_theta"]),
        parallel_residual=False, bias=SHAPE["mlp_bias"], attn_bias=SHAPE["attention_bias"],
        norm_class_name=NORMS[SHAPE["norm"]], norm_eps=SHAPE["rms_norm_eps"], mlp_class_name=MLPS[SHAPE["mlp"]],
        gelu_approximate="tanh",
    )  # fmt: skip


def patch_litgpt_logging(models: list[torch.nn.Module]) -> None:
    """Pass on every loss that litgpt logs, once per step and per evaluation; leave its last save out.

    `models` gets the model that it optimises.
    """
    log, setup = pretrain.L.Fabric.log_dict, pretrain.L.Fabric.setup

    def log_dict(fabric: Any, metrics: Any, *words: Any, **named: Any) -> None:
        log(fabric, metrics, *words, **named)
        if "loss" in metrics:
            write_step_line(int(metrics["step"]), float(metrics["loss"]), models[0])
        if "val_loss" in metrics:  # the mean over batches, which are equally large
            write_validation_line((named["step"] + 1) // ACCUMULATION, float(metrics["val_loss"]))

    def kept(fabric: Any, module: Any, *words: Any, **named: Any) -> Any:
        models.append(module)
        return setup(fabric, module, *words, **named)

    pretrain.L.Fabric.log_dict, pretrain.L.Fabric.setup = log_dict, kept
    pretrain.save_checkpoint = lambda *_, **__: None


def patch_litgpt_schedule() -> None:
    """litgpt has a cosine, and a constant rate that is one; any other schedule stands in the place of that."""
    if TASK["schedule"] not in OWN_SCHEDULES:
        pretrain.get_lr = lambda _peak, done, *_: LRS[done // ACCUMULATION]


def train_with_litgpt() -> None:
    """Train on the task's rows."""
    patch_litgpt_logging([])
    patch_litgpt_schedule()
    rows_per_step, T = MICRO_BATCH * ACCUMULATION, load_task_rows().shape[1] - 1
    model = make_litgpt_config(T)
    pretrain.setup(
        model_name=model.name, model_config=model, out_dir=TASK["folder"], precision=PRECISIONS[TASK["precision"]],
        data=TaskDataModule(), devices=1, logger_name="csv", seed=TASK["seed"],
        train=TrainArgs(
            save_interval=None, log_interval=1, global_batch_size=rows_per_step, micro_batch_size=MICRO_BATCH,
            lr_warmup_steps=TASK["warmup_steps"], max_norm=TASK["gradient_clipping"] or math.inf,
            min_lr=TASK["lr"] if TASK["schedule"] == "constant" else TASK["final_lr"],
            max_tokens=STEPS * rows_per_step * T, max_seq_length=T, tie_embeddings=SHAPE["tie_word_embeddings"],
        ),
        eval=EvalArgs(
            interval=VALIDATE_EVERY or 10**9, max_iters=10**9, initial_validation=False, final_validation=False
        ),
        optimizer={
            "class_path": "torch.optim.AdamW",
            "init_args": {
                "lr": TASK["lr"], "weight_decay": TASK["weight_decay"], "betas": [TASK["beta1"], TASK["beta2"]],
                "eps": TASK["eps"],
            },
        },
    )  # fmt: skip


train_with_litgpt()
exit_at_once()
