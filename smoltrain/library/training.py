"""`smoltrain.train`: a run inside a program, with the program's own documents, model and metrics."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from smoltrain.config.schema import Config, OwnModelSection
from smoltrain.errors import DONE, INTERRUPTED, STOPPED, Problem, TrainingStopped, UserError, format_value
from smoltrain.launch.in_process import train_in_process
from smoltrain.launch.supervisor import supervise_config
from smoltrain.library.documents import write_documents
from smoltrain.library.run import Run
from smoltrain.model.own_model import provide_model, use_own_model
from smoltrain.training.callbacks import StepCallback


def train(
    config: Config,
    *,
    ranks: int | None = None,
    callbacks: Sequence[StepCallback] = (),
    documents: Iterable[str] | None = None,
    model: nn.Module | Callable[[], nn.Module] | None = None,
) -> Run:
    """Train a config to the end of its plan, or go on where its run folder stands. Returns the run.

    By default one rank trains, in this process, which is given back as it was: signal handlers, environment, random
    states, threads and loggers. The same config gives the same weights as `smoltrain train --ranks 1`, to the bit.
    An interrupt (Ctrl-C, or a notebook's Interrupt Kernel) ends training after the step and saves; the run that is
    returned then says so in `stop_reason`, and the same call goes on from there. The second one raises
    KeyboardInterrupt. Other signals that ask a run to stop (SIGTERM, SIGHUP, SIGUSR1) are raised again once it is
    saved.

    Args:
        config: What `load_config` returns.
        ranks: So many processes instead, as `smoltrain train --ranks` starts them: the program waits for them.
        callbacks: Each is called after every step as `callback(step, metrics)`; what it returns, numbers by name, goes
            to metrics.jsonl and W&B as `custom/NAME`. If one raises, the state is saved and the error is raised here.
        documents: Texts to train on instead of the recipe's data. They are read to the end at every start and written
            once, to `documents.jsonl` in the run's folder; a run goes on with the same texts alone.
        model: A torch module, or a function that makes one, instead of the recipe's model; `smoltrain.model.own_model`
            says what it must do. A module is copied, never changed; a function is called after the run's seed is set.

    Raises:
        UserError: For what cannot run, before the first step.
        TrainingStopped: When the run itself went wrong.
    """
    _check_seams(config, ranks, callbacks, model)
    if documents is not None:
        config = write_documents(config, documents)
    if model is not None:
        config = use_own_model(config, model)
        assert isinstance(config.model, OwnModelSection)
        print(f"model: {config.model.class_name}, in place of the recipe's; how it computes is its own affair")
    if ranks is not None:
        return Run(config.run_folder, stop_reason=_train_in_processes(config, ranks))
    with provide_model(model):
        return Run(config.run_folder, stop_reason=train_in_process(config, callbacks))


def _check_seams(config: object, ranks: int | None, callbacks: Sequence[StepCallback], model: object) -> None:
    """Errors: UserError for arguments of another kind, and for what other processes cannot be given."""
    if not isinstance(config, Config):
        raise UserError(
            Problem("this is no config", format_value(config), "what smoltrain.load_config returns", "config")
        )
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        want = "functions, in a list say"
        raise UserError(Problem("callbacks are not valid", format_value(callbacks), want, "callbacks"))
    if model is not None and not callable(model):  # a module is, too
        raise UserError(Problem("this is no model", format_value(model), "a torch module, or a function", "model"))
    given = {"callbacks": bool(callbacks), "model": model is not None}
    names = [name for name, is_given in given.items() if is_given]
    if ranks is not None and names:
        what = "what is this program's own cannot train in other processes"
        raise UserError(Problem(what, f"{' and '.join(names)} with ranks={ranks}", "one of the two", "ranks=None"))


def _train_in_processes(config: Config, ranks: int) -> str | None:
    """Under the supervisor; the reason of a stop, or None if it is done. Errors: as `train`."""
    code = supervise_config(lambda: config, [config.run.name], ranks)
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code not in (DONE, STOPPED):
        raise TrainingStopped(f"the ranks ended with code {code}, and have said why")
    return "a signal" if code == STOPPED else None
