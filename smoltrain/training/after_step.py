"""What is due after a step, and what is written down of it. Each function is collective: every rank must call it."""

import time
from statistics import mean

from smoltrain.evaluation.memorisation import find_reason_unknown
from smoltrain.kernels.compile import note_compiled
from smoltrain.run.run_warnings import (
    communication_share,
    copying_warning,
    memorisation_warning,
    slow_data_warning,
    slow_network_warning,
)
from smoltrain.training.callbacks import CallbackFailed, run_callbacks
from smoltrain.training.evaluate import evaluate_loss
from smoltrain.training.evaluate_tasks import evaluate_run_tasks
from smoltrain.training.memorise import measure_memorisation
from smoltrain.training.sample import sample_prompts
from smoltrain.training.session import Session
from smoltrain.training.step_result import StepResult


def is_anything_due(session: Session, step: int) -> bool:
    """Whether something looks at the state after this step, which must be settled then."""
    config = session.config
    every = (
        config.evaluate.every, config.evaluate.tasks_every, config.evaluate.memorisation_every,
        config.sample.every, config.checkpoint.every,
        config.track.gradients_every,
    )  # fmt: skip
    return bool(session.callbacks) or session.plan.ends_phase(step) or any(session.plan.is_due(step, n) for n in every)


def record(session: Session, step: int, result: StepResult) -> None:
    """Write down what a step did: metrics, warnings, what the loader met."""
    session.validation_loss = None
    session.recent.append(result)
    last_step = session.start.last_step
    metrics: dict[str, float | str] = {**result.metrics, "train/skipped_updates": session.num_skipped}
    metrics |= _measure_start(session, result.metrics["speed/step_s"])
    if len(session.recent) == session.recent.maxlen:
        wait_share = mean(recent.metrics["speed/data_wait_share"] for recent in session.recent)
        session.tracker.warn_once("slow data", slow_data_warning(wait_share))
        session.tracker.warn_once("slow network", _warn_of_network(session))
    session.tracker.log_step(step, last_step, session.plan.phase(step).name, metrics)
    for note in session.loader.health.take_notes():
        session.tracker.say(note)
    if result.layer_gradients:
        session.tracker.log_gradients(step, result.layer_gradients)
    if result.layer_weights:
        session.tracker.log_weights(step, result.layer_weights)


def call_callbacks(session: Session, step: int, result: StepResult) -> None:
    """Call the program that this run trains inside, and write down the metrics that it gives.

    Errors: CallbackFailed, once the state after this step is saved.
    """
    try:
        custom = run_callbacks(session.callbacks, step, result.metrics)
    except CallbackFailed:
        save(session, step)
        session.saver.finish()
        raise
    if custom:
        session.tracker.log_metrics(step, {**custom})


def record_rows(session: Session, result: StepResult) -> None:
    """Write the rows of a step into the ledger, and count its skips; also those of a step which was stopped."""
    session.watchdog.mark("records")
    session.num_skipped += result.num_skipped
    if session.ledger:
        session.ledger.append(result.digests)


def validate(session: Session, step: int) -> bool:
    """Evaluate on the held-out rows. False if a rank is to stop meanwhile: the next start makes up for it."""
    began_s = time.perf_counter()
    batches = session.loader.validation_batches(session.config.evaluate.rows)
    losses = evaluate_loss(session, batches, session.bytes_per_id)
    if losses is None:
        return False
    [took_s] = session.world.max_floats(time.perf_counter() - began_s)
    session.validation_loss, bits_per_byte = losses
    durations = {"speed/evaluation_s": took_s, **_measure_start(session, took_s)}
    session.tracker.log_validation(step, session.validation_loss, bits_per_byte, durations)
    if session.recent:
        train_loss = mean(recent.metrics["train/loss_nats_per_token"] for recent in session.recent)
        warning = memorisation_warning(train_loss, session.validation_loss, session.loader.repeat_factor)
        session.tracker.warn_once("memorising", warning)
    return True


def evaluate_tasks(session: Session, step: int) -> None:
    """Measure the recipe's tasks. Nothing is logged if a rank is to stop meanwhile."""
    began_s = time.perf_counter()
    metrics = evaluate_run_tasks(session, session.tasks)
    if metrics is None:
        return
    [took_s] = session.world.max_floats(time.perf_counter() - began_s)
    session.tracker.log_tasks(step, metrics, {"speed/task_evaluation_s": took_s, **_measure_start(session, took_s)})


def gauge_memorisation(session: Session, step: int) -> None:
    """Measure how much of what the model writes is copied, unless a rank is to stop or nobody can know."""
    if find_reason_unknown(session.loader.prepared):  # which the start has said
        return
    began_s = time.perf_counter()
    found = measure_memorisation(session)
    if found is None:
        return
    [took_s] = session.world.max_floats(time.perf_counter() - began_s)
    session.tracker.log_metrics(step, {**found.metrics(), "speed/memorisation_s": took_s})
    session.tracker.say(f"memorisation at step {step}: {found.describe()}")
    session.tracker.warn_once("copying", copying_warning(found))


def sample(session: Session, step: int) -> None:
    """Let the model write after the recipe's prompts."""
    began_s = time.perf_counter()
    texts = sample_prompts(session)
    [took_s] = session.world.max_floats(time.perf_counter() - began_s)
    session.tracker.log_samples(step, texts)
    session.tracker.log_metrics(step, {"speed/sampling_s": took_s})


def save(session: Session, step: int) -> None:
    """Begin a checkpoint of the state after `step`, unless there is one; it is written beside training."""
    if session.saved_step == step:
        return
    session.watchdog.mark("save")
    if session.ledger:
        session.ledger.sync()
    pause_s = session.saver.start_save(
        step, session.engine, session.loader, skipped_updates=session.num_skipped, precision=session.precision,
        wandb_id=session.folder.wandb_id, identity=session.folder.identity, validation_loss=session.validation_loss,
        validation_rows=session.config.evaluate.rows,
    )  # fmt: skip
    session.saved_step = step
    session.tracker.log_metrics(step, {"speed/checkpoint_pause_s": pause_s})


def record_closing(session: Session, step: int, closing_s: float) -> None:
    """Write down how long it took to leave the loop, if anything was done in it."""
    if session.start_was_logged:
        session.tracker.log_metrics(step, {"speed/closing_s": closing_s})


def _warn_of_network(session: Session) -> str | None:
    metrics = [recent.metrics for recent in session.recent]
    return slow_network_warning(
        communication_share(metrics), metrics[-1].get("speed/communication_mb", 0.0),
        each_micro_batch=session.config.engine.reduce_gradients == "micro_batch",
        num_machines=session.world.num_machines,
    )  # fmt: skip


def _measure_start(session: Session, work_s: float) -> dict[str, float]:
    """Seconds from the command's start to the first thing that is logged, which took `work_s`, and those for the data.

    {} afterwards.
    """
    if session.start_was_logged:
        return {}
    session.start_was_logged = True
    if session.compiled_code and session.world.is_first:
        note_compiled(session.compiled_code)
    start_s = max(0.0, time.time() - session.start.began_at - work_s)
    return {"speed/start_s": start_s, "speed/preparation_s": min(session.start.preparation_s, start_s)}
