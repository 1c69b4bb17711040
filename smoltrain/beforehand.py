"""What can be known to be wrong before anything slow begins: nothing is tokenised for a run that could not start.

The ranks would find the same, minutes later and all at once.
"""

import torch

from smoltrain import data, ds_config, kernels, model, runfolder
from smoltrain.schema import Config


def of_recipe(config: Config) -> None:
    """What is wrong on any machine, without the network. Errors: UserError."""
    precision = config.engine.precision
    known = None if precision == "auto" else precision
    ds_config.fill(config, precision=known, accumulation=config.batch.accumulation, world_size=None)
    model.build(config.model, device="meta", document_mask=config.packing.document_mask)
    data.check_tokenizer(config)


def of_start(config: Config, device: torch.device, ranks: int, rows_per_step: int) -> None:
    """What is wrong on this machine, for so many ranks: precision, kernels, the model's class, DeepSpeed's config.

    Errors: UserError.
    """
    data.check_tokenizer(config)
    precision, _ = ds_config.choose_precision(config.engine.precision, device)
    accumulation = runfolder.accumulation(config, rows_per_step, ranks)
    ds_config.fill(config, precision=precision, accumulation=accumulation, world_size=ranks)
    built = model.build(config.model, device="meta", document_mask=config.packing.document_mask)
    count = model.parameter_count(built)
    kernels.settle(config, device, precision, num_parameters=count, rows_per_step=rows_per_step)
