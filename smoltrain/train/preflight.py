"""What can be known to be wrong before anything slow begins: nothing is tokenised for a run that could not start.

The ranks would find the same, minutes later and all at once.
"""

import torch

from smoltrain.config.schema import Config
from smoltrain.data.tokens.check_fit import check_tokenizer_fits
from smoltrain.engine.deepspeed_json import fill_deepspeed_config
from smoltrain.kernels.precision import choose_precision
from smoltrain.model.build import build_model, count_parameters
from smoltrain.model.choose_kernels import choose_kernels
from smoltrain.run.run_folder import accumulation_steps


def check_recipe(config: Config) -> None:
    """What is wrong on any machine, without the network. Errors: UserError."""
    precision = config.engine.precision
    known = None if precision == "auto" else precision
    fill_deepspeed_config(config, precision=known, accumulation=config.batch.accumulation, world_size=None)
    build_model(config.model, device="meta", document_mask=config.packing.document_mask)
    check_tokenizer_fits(config)


def check_start(config: Config, device: torch.device, ranks: int, rows_per_step: int) -> None:
    """What is wrong on this machine, for so many ranks: precision, kernels, the model's class, DeepSpeed's config.

    Errors: UserError.
    """
    check_tokenizer_fits(config)
    precision, _ = choose_precision(config.engine.precision, device)
    accumulation = accumulation_steps(config, rows_per_step, ranks)
    fill_deepspeed_config(config, precision=precision, accumulation=accumulation, world_size=ranks)
    built = build_model(config.model, device="meta", document_mask=config.packing.document_mask)
    count = count_parameters(built)
    choose_kernels(config, device, precision, num_parameters=count, rows_per_step=rows_per_step)
