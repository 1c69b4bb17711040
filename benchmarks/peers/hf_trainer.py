"""transformers' Trainer; with --deepspeed through its own DeepSpeed integration, ZeRO-2."""

import sys
from typing import Any

import torch
from peer import ACCUMULATION, MICRO_BATCH, STEPS, TASK, exit_at_once, load_task_rows, write_step_line
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

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
    """The task's rows; labels are shifted here, so that all T of a row count."""

    def __init__(self) -> None:
        self.rows_NS = load_task_rows()

    def __len__(self) -> int:
        return len(self.rows_NS)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids_T, targets_T = self.rows_NS[i, :-1], self.rows_NS[i, 1:]
        return {"input_ids": ids_T, "labels": ids_T, "shift_labels": targets_T}


class LossWriter(TrainerCallback):
    """Tells the loss that the Trainer logs at each step; the summary at the end has no `loss`."""

    def on_log(self, *arguments: Any, **named: Any) -> None:
        """Called by the Trainer; its state is the second argument."""
        if "loss" in named["logs"]:
            write_step_line(arguments[1].global_step, float(named["logs"]["loss"]), named["model"])


def train_with_hf_trainer() -> None:
    """Train on the task's rows."""
    precision = TASK["precision"]
    arguments = TrainingArguments(
        output_dir=TASK["folder"], per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=ACCUMULATION,
        max_steps=STEPS, learning_rate=TASK["lr"], lr_scheduler_type="constant", weight_decay=TASK["weight_decay"],
        adam_beta1=TASK["beta1"], adam_beta2=TASK["beta2"], adam_epsilon=TASK["eps"],
        max_grad_norm=TASK["gradient_clipping"], bf16=precision == "bf16", fp16=precision == "fp16",
        use_cpu=TASK["device"] == "cpu", activation_checkpointing=TASK["recompute"], seed=TASK["seed"],
        train_sampling_strategy="sequential", remove_unused_columns=False, logging_steps=1, save_strategy="no",
        report_to="none", disable_tqdm=True, deepspeed=ZERO2 if "--deepspeed" in sys.argv else None,
    )  # fmt: skip
    torch.manual_seed(TASK["seed"])
    config = AutoConfig.for_model(**TASK["model"], use_cache=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    Trainer(model=model, args=arguments, train_dataset=TaskDataset(), callbacks=[LossWriter()]).train()


train_with_hf_trainer()
exit_at_once()
