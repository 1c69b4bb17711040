"""transformers' Trainer (5.17 or newer); --compile is its torch_compile, --deepspeed its own ZeRO-2."""

import dataclasses
import sys
from typing import Any

import torch
from hf_model import build_hf_model
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
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

AUTO = "auto"  # in DeepSpeed's JSON: the Trainer fills it in
ZERO2: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": AUTO,
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "bf16": {"enabled": AUTO},
    "fp16": {"enabled": AUTO},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


class TaskDataset(Dataset):
    """Rows of the task; labels are shifted here, so that all T of a row count."""

    def __init__(self, rows_NS: torch.Tensor) -> None:
        self.rows_NS = rows_NS

    def __len__(self) -> int:
        return len(self.rows_NS)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids_T, targets_T = self.rows_NS[i, :-1], self.rows_NS[i, 1:]
        return {"input_ids": ids_T, "labels": ids_T, "shift_labels": targets_T}


class PlannedTrainer(Trainer):
    """The Trainer with a schedule of one's own, by the hook that it has for that.

    None of its schedules is smoltrain's: their warm-up begins at 0, or their cosine is a step ahead.
    """

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:  # noqa: ARG002
        """Called by the Trainer."""
        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, compute_lr_factor)
        return self.lr_scheduler


def compute_lr_factor(done: int) -> float:
    """The rate after `done` steps over the peak; the Trainer also asks behind the last step."""
    return LRS[min(done, STEPS - 1)] / TASK["lr"]


class LossWriter(TrainerCallback):
    """Tells the loss that the Trainer logs at each step, and of each evaluation; the summary at the end has neither."""

    def on_log(self, *arguments: Any, **named: Any) -> None:
        """Called by the Trainer; its state is the second argument."""
        if "loss" in named["logs"]:
            write_step_line(arguments[1].global_step, float(named["logs"]["loss"]), named["model"])

    def on_evaluate(self, *arguments: Any, **named: Any) -> None:
        """Called by the Trainer behind its own evaluation: the mean over rows, which are equally long."""
        write_validation_line(arguments[1].global_step, float(named["metrics"]["eval_loss"]))


def name_of_recomputation() -> str:
    """The keyword for gradient checkpointing, which has another name since transformers 5.2x."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def train_with_hf_trainer() -> None:
    """Train on the task's rows."""
    precision = TASK["precision"]
    recomputation = {name_of_recomputation(): TASK["recompute"]}
    evaluation: dict[str, Any] = {}
    held_out = None
    if VALIDATE_EVERY:
        held_out = TaskDataset(load_validation_rows())
        evaluation = {
            "eval_strategy": "steps", "eval_steps": VALIDATE_EVERY, "prediction_loss_only": True,
            "per_device_eval_batch_size": find_validation_batch(len(held_out)),
        }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=TASK["folder"], per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS, learning_rate=TASK["lr"], weight_decay=TASK["weight_decay"],
        adam_beta1=TASK["beta1"], adam_beta2=TASK["beta2"], adam_epsilon=TASK["eps"],
        max_grad_norm=TASK["gradient_clipping"], bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=TASK["device"] == "cpu", seed=TASK["seed"], torch_compile="--compile" in sys.argv,
        train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, deepspeed=ZERO2 if "--deepspeed" in sys.argv else None,
        **recomputation, **evaluation,
    )  # fmt: skip
    PlannedTrainer(
        model=build_hf_model(), args=arguments, train_dataset=TaskDataset(load_task_rows()), eval_dataset=held_out,
        callbacks=[LossWriter()],
    ).train()  # fmt: skip


train_with_hf_trainer()
exit_at_once()
