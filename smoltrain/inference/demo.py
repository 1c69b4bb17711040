"""A model's text in the browser, token by token: `smoltrain demo`. The one module that knows gradio.

Nothing leaves the machine: no analytics, no share link, and the page asks no other host for scripts or fonts.
"""

import html
import os
import socket
import sys
from collections.abc import Iterator
from functools import partial
from threading import Lock
from typing import Any

import torch

from smoltrain.checkpoint.manifest import list_checkpoint_steps
from smoltrain.config.load import override_generation
from smoltrain.config.schema import MAX_SEED
from smoltrain.distributed.world import choose_device
from smoltrain.errors import Problem, TrainingStopped, UserError
from smoltrain.inference.load import LoadedModel, load_trained_model
from smoltrain.model.build import count_parameters

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read once, while gradio is imported
try:
    import gradio as gr
    from gradio.themes import Default as Theme
except ImportError as error:
    want = '`pip install -e ".[demo]"` in a checkout, or `pip install "WHEEL[demo]"` with the path of a wheel'
    raise UserError(Problem("the demo's packages are not installed", str(error), want, "the environment")) from None

HOST, PORT = "127.0.0.1", 7860
# A model may write what a page would obey: controls are shown as their pictures, turns of direction as U+FFFD.
CONTROL_PICTURES = (
    {i: 0x2400 + i for i in range(0x20) if chr(i) not in "\t\n"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], 0xFFFD)
)
CSS = "#about h2 {margin: 0} #text textarea {font-family: var(--font-mono)}"


class DemoModels:
    """Loads a run's checkpoints (or one Hugging Face folder) on demand, and keeps the model that was loaded last."""

    def __init__(self, run: str) -> None:
        """Load the newest valid checkpoint. Errors: UserError, as load_trained_model."""
        self.device = choose_device("mps" if torch.backends.mps.is_available() else "auto")
        self._run = run
        self._lock = Lock()  # who stops while a model is being loaded leaves that work behind, still under way
        self._last = self._load_to_device(None)

    def list_steps(self) -> list[int]:
        """The steps that have a checkpoint now, newest first: a run under way adds and deletes some."""
        return list_checkpoint_steps(self._last.folder / "checkpoints")[::-1]

    def load(self, step: int | None = None) -> LoadedModel:
        """The model of a step, or the one loaded last. Errors: UserError, as load_trained_model."""
        with self._lock:
            if step not in (None, self._last.step):
                self._last = self._load_to_device(step)
            return self._last

    def _load_to_device(self, step: int | None) -> LoadedModel:
        loaded = load_trained_model(self._run, step)
        loaded.model.to(self.device)
        return loaded


def serve_demo(run: str, host: str = HOST, port: int = PORT) -> None:
    """Show the page until Ctrl-C. Errors: UserError for a run without a model, an address that cannot be served on."""
    check_port_free(host, port)  # before the model is loaded; gradio itself would wait five seconds for the port
    if not (host == "localhost" or host.startswith("127.")):
        print(f"warning: --host {host} lets others in, and the demo asks for no password", file=sys.stderr)
    models = DemoModels(run)
    page = build_page(models)
    theme = Theme(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    page.launch(
        server_name=host, server_port=port, share=False, ssr_mode=False, mcp_server=False, run_history=False,
        footer_links=[], theme=theme, css=CSS, quiet=True, prevent_thread_lock=True,
    )  # fmt: skip
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
    """The page: prompt, buttons and text on the left, the sampling settings on the right."""
    loaded = models.load()
    with gr.Blocks(title=f"smoltrain: {loaded.folder.name}", analytics_enabled=False, fill_width=True) as page:
        headline = gr.Markdown(describe_model(loaded, models.device), elem_id="about")
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
                text = gr.Textbox(
                    label="Text", lines=14, max_lines=14, interactive=False, buttons=["copy"], elem_id="text"
                )
            with gr.Column(scale=1, min_width=280):
                controls = build_controls(models)

        writing = start.click(
            partial(generate_for_page, models), [prompt, *controls], [text, headline],
            api_name="generate", show_progress_on=text,
        )  # fmt: skip
        stop.click(None, cancels=writing)
        page.load(
            lambda: gr.Dropdown(list_checkpoint_choices(models)), outputs=controls[0],
            show_progress="hidden", api_visibility="private",
        )  # fmt: skip
    return page


def build_controls(models: DemoModels) -> list[Any]:
    """What stands beside the prompt, in the order of generate_for_page's arguments; the checkpoint comes first."""
    loaded = models.load()
    settings = loaded.generation
    most = loaded.model.section.max_position_embeddings - 1  # the prompt takes one
    checkpoint = gr.Dropdown(
        list_checkpoint_choices(models), value=loaded.step, label="Checkpoint", visible=bool(models.list_steps()),
        elem_id="step",
    )  # fmt: skip
    return [
        checkpoint,
        make_slider("Temperature", settings.temperature, 0, 2, 0.01),
        make_slider("Top-k (0 keeps all)", settings.top_k, 0, 200, 1),
        make_slider("Top-p", settings.top_p, 0.01, 1, 0.01),
        make_slider("New tokens at most", min(settings.max_tokens, most), 1, most, 1, elem_id="max-tokens"),
        gr.Checkbox(label="Greedy: always the likeliest token"),
        gr.Number(loaded.seed, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, elem_id="seed"),
    ]


def make_slider(
    label: str, value: float, least: float, most: float, step: float, elem_id: str | None = None
) -> gr.Slider:
    """A slider that stands at the recipe's value, its ends moved where that lies beyond them."""
    return gr.Slider(min(least, value), max(most, value), value, step=step, label=label, elem_id=elem_id)


def list_checkpoint_choices(models: DemoModels) -> list[tuple[str, int]]:
    """The entries of the list of checkpoints, and the steps they stand for."""
    return [(f"step {step:,}", step) for step in models.list_steps()]


def describe_model(loaded: LoadedModel, device: torch.device) -> str:
    """The page's headline in Markdown: run, parameters, step, device."""
    step = "" if loaded.step is None else f" · step {loaded.step:,}"
    return f"## {loaded.folder.name}\n{count_parameters(loaded.model):,} parameters{step} · on {device}"


def generate_for_page(
    models: DemoModels, prompt: str, step: int | None, temperature: float, top_k: int, top_p: float, max_tokens: int,
    greedy: bool, seed: int | None,
) -> Iterator[tuple[str, str]]:  # fmt: skip
    """(The prompt and what the model has made of it so far, the headline), again and again.

    Errors: gr.Error, which the page shows.
    """
    text = prompt
    notes: list[str] = []
    try:
        loaded = models.load(step)
        settings = override_generation(
            loaded.generation, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_tokens
        )
        seed = loaded.seed if seed is None else seed
        for piece in loaded.generate_text(prompt, settings, greedy=greedy, seed=seed, say=notes.append):
            text += piece
            yield text.translate(CONTROL_PICTURES), describe_model(loaded, models.device)
    except (UserError, TrainingStopped) as error:
        raise gr.Error(html.escape(str(error)), print_exception=False) from None
    for note in notes:
        gr.Info(note)
    if text == prompt:
        gr.Info("The model ended the document here. Another seed may write more.", title="No text")
