"""How much of what the model writes is copied from the training tokens, measured during training by all ranks."""

from smoltrain.evaluation.memorisation import NUM_TEXTS, Memorisation, MemorisationProbe
from smoltrain.inference.draw_texts import draw_texts
from smoltrain.training.session import Session


def measure_memorisation(session: Session) -> Memorisation | None:
    """What the model, as it is now, copies; None if a rank is to stop. Collective.

    Every rank draws, as ZeRO-3's forward is collective; the texts of rank 0 are looked for, by each rank in its part of
    the training tokens. The draws have a random state of their own, so that training goes on as without them.
    """
    config = session.config
    world = session.world
    prepared = session.loader.prepared
    tokenizer = prepared.tokenizer
    if session.is_any_to_stop():
        return None
    weights = [part.weight for part in config.data.parts]
    probe = MemorisationProbe(prepared, weights, NUM_TEXTS, config.batch.sequence_length)
    with session.engine.evaluation_mode():
        own = draw_texts(
            session.engine.module, probe.prompts, probe.num_new_tokens,
            stop_ids=session.stop_ids, banned_ids=tokenizer.unused_ids(config.model.vocab_size), seed=config.run.seed,
            mark=lambda: session.watchdog.mark("memorisation"),
        )  # fmt: skip
    probe.take_texts(world.run_on_first_rank(lambda: own))
    if session.is_any_to_stop():
        return None
    session.watchdog.mark("memorisation")
    return probe.count(world.sum_ints(*probe.search(world.rank, world.size)))
