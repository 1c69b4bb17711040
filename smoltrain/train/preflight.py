"""What can be known to be wrong before anything slow begins: nothing is tokenised for a run that could not start."""

import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.check_fit import check_tokenizer_fits
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.model.build import build_model
from smoltrain.run.run_folder import accumulation_steps
from smoltrain.train.resolve_auto import choose_computing


def check_recipe(config: Config) -> None:
    """Check what would be wrong on any machine, without the network. Errors: UserError."""
    precision = config.engine.precision
    known = None if precision == "auto" else precision
    fill_deepspeed_config(config, precision=known, accumulation=config.batch.accumulation, world_size=None)
    build_model(config.model, device="meta", document_mask=config.packing.document_mask)
    check_tokenizer_fits(config)


def check_start(config: Config, device: torch.device, num_ranks: int, rows_per_step: int) -> None:
    """Check what would be wrong on this machine: precision, kernels, the model's class, DeepSpeed's config.

    Errors: UserError.
    """
    check_tokenizer_fits(config)
    accumulation = accumulation_steps(config, rows_per_step, num_ranks)
    chosen = choose_computing(config, device, rows_per_step)
    fill_deepspeed_config(config, precision=chosen.precision, accumulation=accumulation, world_size=num_ranks)
