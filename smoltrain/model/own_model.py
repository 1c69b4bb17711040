"""A torch module of a program's own, behind the interface of every model (interface.py).

What such a module must do: `forward(ids_BT)` takes token ids, int64 [B, T], and returns causal logits [B, T, V] of any
float type; V is `model.vocab_size`. All else may be left out:

- `forward(ids_BT, labels_BT)`, where it has a parameter of this name, returns the summed loss of the labels instead, an
  fp32 scalar; labels are shifted already, and IGNORE_INDEX (-100) where there is no target. Otherwise the cross entropy
  of the logits is taken.
- `new_cache(batch, max_length)` makes a cache, and `forward(ids_BT, cache=cache)` continues the text in it. Otherwise
  the whole text is run again for each token that is written.
- `forward(ids_BT, positions_BT=...)` keeps packed documents apart, which `packing.document_mask` needs.

A run's config.yaml says that the model is a program's own, not what it computes: whoever goes on with the run, or loads
it, hands over the module again. It stands in a context variable meanwhile, for everything that builds a model.

Legend: B batch, T tokens, V vocabulary.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from smoltrain.config.rules import find_contradictions
from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.errors import Problem, UserError
from smoltrain.kernels.loss import summed_cross_entropy_of_logits
from smoltrain.model.interface import LanguageModel, logits_differ

MODEL_ARGUMENT = "model, the argument of train and load"
_provided: ContextVar[Callable[[], nn.Module] | None] = ContextVar("own_model", default=None)


class OwnModelCache:
    """The ids so far, for a module without a cache of its own."""

    def __init__(self) -> None:
        self.ids_BT: Tensor | None = None
        self.length = 0


class OwnModel(LanguageModel):
    """`inner` is the program's module: the keys of the state dict are 'inner.' and its own."""

    def __init__(self, section: OwnModelSection, inner: nn.Module, z_loss: float = 0.0) -> None:
        super().__init__()
        self._section = section
        self._z_loss = z_loss
        self.inner = inner
        self.forward_arguments = set(inspect.signature(inner.forward).parameters)

    @property
    def section(self) -> OwnModelSection:
        """What the config says of it."""
        return self._section

    def forward(
        self, ids_BT: Tensor, labels_BT: Tensor | None = None, cache: Any = None, *,
        last_only: bool = False, positions_BT: Tensor | None = None, num_documents: int | None = None,  # noqa: ARG002
    ) -> Tensor:  # fmt: skip
        """See LanguageModel."""
        options: dict[str, Any] = {} if positions_BT is None else {"positions_BT": positions_BT}
        if labels_BT is not None:
            if "labels_BT" in self.forward_arguments:
                return self.inner(ids_BT, labels_BT=labels_BT, **options)
            logits_BTV = self.inner(ids_BT, **options)
            return summed_cross_entropy_of_logits(logits_BTV.flatten(0, 1), labels_BT.flatten(), self._z_loss)
        T = ids_BT.size(1)
        if isinstance(cache, OwnModelCache):
            ids_BT = ids_BT if cache.ids_BT is None else torch.cat((cache.ids_BT, ids_BT), dim=1)
            cache.ids_BT = ids_BT
            cache.length = ids_BT.size(1)
        elif cache is not None:
            options["cache"] = cache
        logits_BTV = self.inner(ids_BT, **options)
        return logits_BTV[:, -1:] if last_only else logits_BTV[:, -T:]

    def new_cache(self, batch: int, max_length: int) -> Any:
        """See LanguageModel."""
        make = getattr(self.inner, "new_cache", None)
        return make(batch, max_length) if make else OwnModelCache()


def use_own_model(config: Config, model: nn.Module | Callable[[], nn.Module]) -> Config:
    """The config with a program's own model instead of the recipe's: vocabulary and longest sequence stay.

    Gradient checkpointing, which is our decoder's, is off. Errors: UserError for what only our models can do.
    """
    named = type(model) if isinstance(model, nn.Module) else model
    section = OwnModelSection(
        kind="own", class_name=getattr(named, "__name__", type(named).__name__),
        vocab_size=config.model.vocab_size, max_position_embeddings=config.model.max_position_embeddings,
    )  # fmt: skip
    engine = config.engine.model_copy(update={"gradient_checkpointing": "none"})
    config = config.model_copy(update={"model": section, "engine": engine})
    if problems := find_contradictions(config):
        raise UserError(*problems)
    return config


@contextlib.contextmanager
def provide_model(model: nn.Module | Callable[[], nn.Module] | None) -> Iterator[None]:
    """Inside, a config whose model is a program's own builds this one: a copy of the module, or what is called."""
    make = (lambda: copy.deepcopy(model)) if isinstance(model, nn.Module) else model
    token = _provided.set(make)
    try:
        yield
    finally:
        _provided.reset(token)


def build_own_model(
    section: OwnModelSection, device: torch.device | str, document_mask: bool, z_loss: float = 0.0
) -> OwnModel:
    """See model.build.build_model. Errors: UserError where no program provides it, and for what is no such module."""
    make = _provided.get()
    if make is None:
        want = "a program that has it: smoltrain.train(config, model=...), smoltrain.load(run, model=...)"
        raise UserError(Problem("this model is one of a program's own", section.class_name, want, "how it is started"))
    inner = make()
    if not isinstance(inner, nn.Module):
        raise UserError(Problem("the model is no torch module", type(inner).__name__, "nn.Module", MODEL_ARGUMENT))
    model = OwnModel(section, inner.float(), z_loss)
    if z_loss and "labels_BT" in model.forward_arguments:
        raise UserError(Problem("a model with its own loss has no z_loss", f"{z_loss:g}", "0", "optimizer.z_loss"))
    if document_mask and "positions_BT" not in model.forward_arguments:
        saw = f"a forward of {section.class_name} without positions_BT"
        raise UserError(Problem("the model cannot keep packed documents apart", saw, "false", "packing.document_mask"))
    _check_own_model(model.cpu())
    return model.to(device)


@torch.no_grad()
def _check_own_model(model: OwnModel) -> None:
    """Run two short texts that differ in their last token. Errors: UserError for logits or a loss that are none."""
    section = model.section
    T = min(4, section.max_position_embeddings)
    ids_BT = torch.full((2, T), min(1, section.vocab_size - 1))  # many a module masks id 0 as padding
    ids_BT[1, -1] = section.vocab_size - 1
    training = model.training
    model.eval()  # no dropout, so no random number is drawn
    try:
        logits_BTV = model.inner(ids_BT)
    except IndexError as error:
        saw = f"{type(error).__name__}: {error}"
        want = f"a model that takes ids up to model.vocab_size - 1 = {section.vocab_size - 1}"
        raise UserError(Problem(f"{section.class_name} does not know every id", saw, want, MODEL_ARGUMENT)) from error
    if not isinstance(logits_BTV, Tensor) or logits_BTV.shape != (2, T, section.vocab_size):
        saw = str(list(logits_BTV.shape)) if isinstance(logits_BTV, Tensor) else type(logits_BTV).__name__
        want = f"logits [B, T, V] = [2, {T}, {section.vocab_size}], V being model.vocab_size"
        raise UserError(Problem(f"{section.class_name} returns no logits", saw, want, MODEL_ARGUMENT))
    before, after = logits_BTV[:, :-1]
    if logits_differ(before, after):
        want = "logits that depend on the tokens before alone"
        saw = "logits that depend on a later token"
        raise UserError(Problem(f"{section.class_name} sees the future", saw, want, MODEL_ARGUMENT))
    loss = float(model(ids_BT, ids_BT))
    summed = float(summed_cross_entropy_of_logits(logits_BTV.flatten(0, 1), ids_BT.flatten()))
    if abs(loss - summed) > 1e-3 * abs(summed):
        want = f"the sum over the labels, {summed:.4f}"
        raise UserError(Problem(f"{section.class_name} returns another loss", f"{loss:.4f}", want, MODEL_ARGUMENT))
    model.train(training)
