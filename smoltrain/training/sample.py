"""What the model writes after the recipe's prompts, during training."""

from smoltrain.inference.generate import decode_stream, generate_ids
from smoltrain.training.session import Session


def sample_prompts(session: Session) -> list[tuple[str, str]]:
    """(prompt, continuation) for each prompt of the recipe, as far as no rank is to stop. Collective.

    Every rank samples the same text, as ZeRO-3's forward is collective.
    """
    config = session.config
    tokenizer = session.loader.prepared.tokenizer
    banned_ids = tokenizer.unused_ids(config.model.vocab_size)
    texts = []
    for prompt in config.sample.prompts:
        session.watchdog.mark("sampling")
        if session.is_any_to_stop():
            break
        ids = tokenizer.encode(prompt) or [tokenizer.separator_id]
        with session.engine.evaluation_mode():
            new_ids = generate_ids(
                session.engine.module, ids, config.generation, stop_ids=session.stop_ids, banned_ids=banned_ids,
                seed=config.run.seed,
            )  # fmt: skip
            # Behind the prompt: by itself the first word would lose the space that many tokenizers spell with it.
            texts.append((prompt, "".join(decode_stream(ids, new_ids, tokenizer.decode))))
    return texts
