"""Verbs that take the model out of a run: generate, chat, export, push, demo."""

import itertools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from smoltrain.cli.app import app
from smoltrain.cli.arguments import CheckpointOption, ModelArgument

if TYPE_CHECKING:
    from smoltrain.config.schema import GenerationSection
    from smoltrain.inference.load import LoadedModel

TemperatureOption = Annotated[float | None, typer.Option(help="Divides the logits; 0 is greedy.")]
TopKOption = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens; 0 keeps all.")]
TopPOption = Annotated[float | None, typer.Option(help="Keep the likeliest tokens of this probability.")]
MaxTokensOption = Annotated[int | None, typer.Option(help="New tokens at most.")]


@app.command(
    "generate", epilog="Example: smoltrain generate quickstart --prompt '**ROMEO**' --temperature 0.8 --top-k 50"
)
def generate_command(
    run: ModelArgument,
    *,
    prompt: Annotated[str, typer.Option(help="Text to go on from; empty begins a new document.")] = "",
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the likeliest token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the draws; by default the run's.")] = None,
    checkpoint: CheckpointOption = None,
) -> None:
    """Write text with a trained model; options that are not given are the recipe's."""
    loaded, settings = _load_writer(
        run, checkpoint, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
    )
    notes: list[str] = []
    seed = loaded.seed if seed is None else seed
    pieces = loaded.generate_text(prompt, settings, greedy=greedy, seed=seed, say=notes.append)
    _print_pieces([prompt], pieces, ["\n"])
    for note in notes:
        print(note, file=sys.stderr)


@app.command("chat", epilog="Example: smoltrain chat quickstart --temperature 0.8")
def chat_command(
    run: ModelArgument,
    *,
    temperature: TemperatureOption = None,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    max_tokens: MaxTokensOption = None,
    seed: Annotated[int | None, typer.Option(help="Of the first answer; by default drawn, and said.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Go on with the text, also with a chat template.")] = False,
    checkpoint: CheckpointOption = None,
) -> None:
    """Talk with a trained model, or let it go on line by line; through a pipe each line gets an answer."""
    from smoltrain.terminal import show_activity

    with show_activity("loading"):  # seconds, for torch is imported
        from smoltrain.inference.chat import Chat, prepare_stdin
        from smoltrain.inference.generate import draw_seed

        loaded, settings = _load_writer(
            run, checkpoint, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
        )
    prepare_stdin()
    Chat(loaded, settings, seed=draw_seed() if seed is None else seed, plain=plain).run()


@app.command("export", epilog="Example: smoltrain export quickstart")
def export_command(
    run: ModelArgument,
    out: Annotated[str | None, typer.Argument(metavar="OUT", help="Folder; by default RUN/export/step-N.")] = None,
    checkpoint: CheckpointOption = None,
    *,
    license: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the model card: apache-2.0, mit, ...; other.")
    ] = None,
    license_name: Annotated[str | None, typer.Option(help="Name of the licence that is `other`.")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(help="Language of the text, for the model card: en, de, ...; also several times."),
    ] = None,
) -> None:
    """Write a Hugging Face folder, reload it with transformers alone and compare logits and text."""
    from smoltrain.export.export import export_model

    about = {"license": license, "license_name": license_name, "language": language}
    export_model(run, out, checkpoint, about=about)


@app.command("push", epilog="Example: HF_TOKEN=... smoltrain push quickstart OWNER/NAME")
def push_command(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, the name of one under runs/, or an export's folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hugging Face Hub.")],
    public: Annotated[bool, typer.Option("--public", help="Anyone may read a repository that is made now.")] = False,
) -> None:
    """Upload a run's export to the Hugging Face Hub; exports first where there is none of the newest checkpoint."""
    from smoltrain.export.push import push_to_hub

    print(push_to_hub(run, repo, private=not public))


@app.command("demo", epilog="Example: smoltrain demo quickstart --port 7860")
def demo_command(
    run: ModelArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="TCP port.")] = 7860,
    *,
    share: Annotated[
        bool, typer.Option("--share", help="Also ask gradio's servers for a link that anyone can open.")
    ] = False,
) -> None:
    """Serve a page that writes with the model: settings, streamed text, checkpoints side by side."""
    from smoltrain.inference.demo import serve_demo

    serve_demo(run, host=host, port=port, share=share)


def _load_writer(run: str, checkpoint: int | None, **options: float | None) -> "tuple[LoadedModel, GenerationSection]":
    """The model where it computes best, and its settings with those options that were given."""
    from smoltrain.config.load import override_generation
    from smoltrain.data.tokenizers.companions import GENERATION_CONFIG, unsupported_generation_settings
    from smoltrain.inference.device import move_to_best_device
    from smoltrain.inference.load import load_trained_model

    loaded = load_trained_model(run, checkpoint)
    if reason := move_to_best_device(loaded.model).reason:
        print(reason, file=sys.stderr)
    settings = override_generation(loaded.generation, **options)
    if left_out := unsupported_generation_settings(loaded.inherited_generation):
        print(f"{GENERATION_CONFIG} asks for more than is done here: {', '.join(left_out)}", file=sys.stderr)
    return loaded, settings


def _print_pieces(*parts: Iterable[str]) -> None:
    """Print pieces of text as they come."""
    from smoltrain.terminal import show_control_characters

    for piece in itertools.chain(*parts):
        print(show_control_characters(piece, sys.stdout), end="", flush=True)
