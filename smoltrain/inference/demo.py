"""A model's text in the browser, token by token: `smoltrain demo`. The one module that knows gradio.

Nothing leaves the machine: no analytics, no share link unless --share asks for one, and the page asks no other host for
scripts or fonts.
"""

import html
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from smoltrain.config.load import override_generation
from smoltrain.config.schema import MAX_SEED
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.inference.demo_models import DemoModels, describe_checkpoint
from smoltrain.inference.demo_passages import CSS, DemoPassage, render_passages
from smoltrain.inference.generate import draw_seed
from smoltrain.inference.load import LoadedModel
from smoltrain.model.build import count_parameters

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read once, while gradio is imported
try:
    import gradio as gr
    from gradio.themes import Default as Theme
except ImportError as error:
    want = '`pip install -e ".[demo]"` in a checkout, or `pip install "WHEEL[demo]"` with the path of a wheel'
    raise UserError(Problem("the demo's packages are not installed", str(error), want, "the environment")) from None

HOST, PORT = "127.0.0.1", 7860
MAX_SIDE_BY_SIDE = 4  # checkpoints, each of which is held in memory
SHARE_WARNING = (
    "warning: --share sends this page through gradio's servers; whoever has the link may use it, without a password, "
    "until the demo ends"
)


def serve_demo(run: str, host: str = HOST, port: int = PORT, *, share: bool = False) -> None:
    """Show the page until Ctrl-C.

    Errors: UserError for a run without a model, an address that cannot be served on, and a share link that gradio's
    servers do not give.
    """
    check_port_free(host, port)  # before the model is loaded; gradio itself would wait five seconds for the port
    if not (host == "localhost" or host.startswith("127.")):
        print(f"warning: --host {host} lets others in, and the demo asks for no password", file=sys.stderr)
    if share:
        print(SHARE_WARNING, file=sys.stderr)
    models = DemoModels(run)
    page = build_page(models)
    theme = Theme(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, share=share, ssr_mode=False, mcp_server=False, run_history=False,
        footer_links=[], theme=theme, css=f"#about h2 {{margin: 0}}{CSS}", quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
    if share and not page.share_url:
        page.close(verbose=False)
        raise UserError(Problem("there is no share link", "none of gradio's servers", "the Internet", "--share"))
    print(f"{run} on {models.device}: http://{host}:{port} (Ctrl-C ends the demo)", flush=True)
    page.block_thread()


def check_port_free(host: str, port: int) -> None:
    """Errors: UserError unless this machine has the address and nobody listens on the port."""
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        saw = f"{host}:{port} ({error.strerror})"
        raise UserError(Problem("the demo cannot be served there", saw, "a free port", "--port or --host")) from None


def build_page(models: DemoModels) -> gr.Blocks:
    """The page: prompt, buttons and texts on the left, the checkpoints and sampling settings on the right."""
    loaded = models.load()[0]
    with gr.Blocks(title=f"smoltrain: {loaded.folder.name}", analytics_enabled=False, fill_width=True) as page:
        about = f"## {loaded.folder.name}\n{count_parameters(loaded.model):,} parameters · on {models.device}"
        gr.Markdown(about, elem_id="about")
        with gr.Row():
            with gr.Column(scale=2):
                prompt = gr.Textbox(
                    label="Prompt", placeholder="Empty begins a new document.", lines=3, max_lines=8, elem_id="prompt"
                )
                recipe_prompts = [[text] for text in loaded.config.sample.prompts if text] if loaded.config else []
                if recipe_prompts:
                    gr.Examples(recipe_prompts, prompt, label="Prompts of the recipe", cache_examples=False)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Stop", elem_id="stop")
                passages = gr.HTML(elem_id="passages")
            with gr.Column(scale=1, min_width=280):
                controls = build_controls(models)

        seed = controls[-1]
        writing = start.click(
            partial(generate_for_page, models), [prompt, *controls], [passages, seed],
            api_name="generate", show_progress_on=passages,
        )  # fmt: skip
        stop.click(None, cancels=writing)
        page.load(
            lambda: gr.Dropdown(list_checkpoint_choices(models)), outputs=controls[0],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page


def build_controls(models: DemoModels) -> list[Any]:
    """What stands beside the prompt, in the order of generate_for_page: checkpoints first, the seed last."""
    loaded = models.load()[0]
    settings = loaded.generation
    most = loaded.model.section.max_position_embeddings - 1  # the prompt takes one
    choices = list_checkpoint_choices(models)
    checkpoints = gr.Dropdown(
        choices, value=[] if loaded.step is None else [loaded.step], label="Checkpoints, side by side",
        multiselect=True, max_choices=MAX_SIDE_BY_SIDE, visible=bool(choices), elem_id="steps",
    )  # fmt: skip
    return [
        checkpoints,
        make_slider("Temperature", settings.temperature, 0, 2, 0.01),
        make_slider("Top-k (0 keeps all)", settings.top_k, 0, 200, 1),
        make_slider("Top-p", settings.top_p, 0.01, 1, 0.01),
        make_slider("New tokens at most", min(settings.max_tokens, most), 1, most, 1, elem_id="max-tokens"),
        gr.Checkbox(label="Greedy: always the likeliest token"),
        gr.Checkbox(True, label="A new seed for each text", elem_id="new-seed"),
        gr.Number(
            draw_seed(), label="Seed", info="Of the texts shown. The same seed, prompt and settings repeat them.",
            precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed",
        ),
    ]  # fmt: skip


def make_slider(
    label: str, value: float, least: float, most: float, step: float, elem_id: str | None = None
) -> gr.Slider:
    """A slider that stands at the recipe's value, its ends moved where that lies beyond them."""
    return gr.Slider(min(least, value), max(most, value), value, step=step, label=label, elem_id=elem_id)


def list_checkpoint_choices(models: DemoModels) -> list[tuple[str, int]]:
    """The entries of the list of checkpoints, and the steps they stand for."""
    return [(describe_checkpoint(*checkpoint), checkpoint.step) for checkpoint in models.list_checkpoints()]


def describe_writer(loaded: LoadedModel) -> str:
    """The title of a model's text."""
    if loaded.manifest is None:
        return loaded.folder.name
    return describe_checkpoint(loaded.manifest.step, loaded.manifest.validation_loss)


def generate_for_page(
    models: DemoModels, prompt: str, steps: list[int], temperature: float, top_k: int, top_p: float, max_tokens: int,
    greedy: bool, is_seed_new: bool, seed: int | None,
) -> Iterator[tuple[str, int]]:  # fmt: skip
    """(What each checkpoint has made of the prompt so far, the seed of all of them), again and again.

    Errors: gr.Error, which the page shows.
    """
    notes: list[str] = []
    seed = draw_seed() if is_seed_new or seed is None else seed
    try:
        writers = models.load(steps)
        passages = [DemoPassage(describe_writer(loaded), prompt) for loaded in writers]
        texts: list[Iterator[str]] = []
        for loaded in writers:
            settings = override_generation(
                loaded.generation, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
            )
            texts.append(loaded.generate_text(prompt, settings, greedy=greedy, seed=seed, say=notes.append))
        writing = list(zip(passages, texts, strict=True))
        while writing:  # a piece of each in turn, so that they grow side by side
            for passage, pieces in list(writing):
                piece = next(pieces, None)
                if piece is None:
                    writing.remove((passage, pieces))
                else:
                    passage.answer += piece
            yield render_passages(passages, seed), seed
    except (UserError, TrainingStopped) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    for note in dict.fromkeys(notes):
        gr.Info(note)
    if not any(passage.answer for passage in passages):
        gr.Info("The model ended the document here. Another seed may write more.", title="No text")
