"""The typed description of a run: every section and field of a recipe, each with its unit.

Nothing here reads a file: load.py does, and rules.py checks what no single field can see.
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

# Beyond any model: what is larger is a slip, and would take all memory or time before it is refused.
MAX_INT = 2**31 - 1
MAX_LAYERS = 1_000
MAX_ROWS = 2**20  # of a micro-batch, and micro-batches of a step
MAX_SEED = 2**63 - 1  # torch takes up to 2^64 - 1, and the ranks add to it
MAX_NAME_BYTES = 200  # file systems take 255
MAX_PATH_BYTES = 4000  # file systems take 4,096


class Section(BaseModel):
    """Frozen; a key that is not a field is an error, and so is a number that is not finite or beyond any run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), serialize_by_alias=True
    )

    @field_validator("*", mode="after")
    @classmethod
    def _check_int(cls, value: object, info: ValidationInfo) -> object:
        if type(value) is int and abs(value) > MAX_INT and info.field_name != "seed":
            raise ValueError(f"at most {MAX_INT:,}")
        return value


def find_path_fault(text: str) -> str | None:
    """What a path must be and is not, None if a file system takes it."""
    if "\0" in text:
        return "a name without NUL"
    path = text.encode()
    if len(path) > MAX_PATH_BYTES or max(map(len, path.split(b"/"))) > MAX_NAME_BYTES:
        return f"at most {MAX_NAME_BYTES} bytes in a name, {MAX_PATH_BYTES} in a path"
    return None


def _check_path(value: str | Path) -> str | Path:
    fault = find_path_fault(str(value))
    if fault:
        raise ValueError(fault)
    return value


def _check_path_or_url(value: str) -> str:
    if "\0" in value:
        raise ValueError("a name without NUL")
    return value


CheckedPath = AfterValidator(_check_path)
PathText = Annotated[str, CheckedPath]
PathOrUrl = Annotated[str, AfterValidator(_check_path_or_url)]  # in a URL a name may be long
# A shell leaves the ~ of `run.folder=~/runs` as it is. Path.expanduser would raise for a user who is not there.
HomePath = Annotated[Path, AfterValidator(lambda path: Path(os.path.expanduser(path))), CheckedPath]  # noqa: PTH111
HomeText = Annotated[str, AfterValidator(os.path.expanduser), CheckedPath]


class RunSection(Section):
    """Where the run lives and how far it goes."""

    name: Annotated[str, Field(pattern=r"^(\w[\w.-]*)?$"), CheckedPath] = Field(
        default="", description="folder under run.folder; empty takes the recipe's name"
    )
    recipe: str = Field(default="", description="name of the recipe, for the model card; empty takes that of its file")
    folder: HomePath = Field(default=Path("runs"), description="parent folder of all runs")
    seed: int = Field(default=1234, ge=0, le=MAX_SEED, description="seeds initial weights, dropout and data order")
    stop_after: str | None = Field(
        default=None, description="name of the phase after which this process ends; null runs all"
    )


class InitSection(Section):
    """What a new run folder begins with; fresh weights without `from`. A run with checkpoints of its own ignores it."""

    source: HomeText | None = Field(
        default=None,
        alias="from",
        description="a run (folder, or name under run.folder), the folder of a checkpoint, or a Hugging Face folder",
    )
    load: Literal["weights", "all"] = Field(
        default="weights", description="all also takes step, moments, random states and data position; runs only"
    )


class ModelSection(Section):
    """The decoder's shape; names are those of transformers' LlamaConfig wherever it has one."""

    kind: Literal["decoder"] = Field(default="decoder", description="smoltrain's own decoder")
    vocab_size: int = Field(gt=0, le=MAX_INT, description="rows of the embedding table")
    hidden_size: int = Field(gt=0, le=2**20, description="width of the residual stream")
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS, description="blocks")
    num_attention_heads: int = Field(gt=0, le=2**20, description="query heads per block")
    num_key_value_heads: int = Field(
        gt=0, le=2**20, description="key and value heads per block (fewer than queries: GQA)"
    )
    intermediate_size: int = Field(gt=0, le=2**24, description="width inside the MLP")
    max_position_embeddings: int = Field(gt=0, le=MAX_INT, description="longest sequence, tokens")
    norm: Literal["rmsnorm", "layernorm"] = Field(default="rmsnorm", description="layernorm has weight and bias")
    rms_norm_eps: float = Field(default=1e-5, gt=0, description="added to the variance, in either norm")
    positions: Literal["rope", "learned"] = Field(default="rope", description="rotary, or a table of learned positions")
    rope_theta: float = Field(default=10000.0, gt=0, description="base of the rotary frequencies")
    mlp: Literal["swiglu", "gelu"] = Field(default="swiglu", description="gelu is the tanh form of GPT-2")
    attention_bias: bool = Field(default=False, description="biases on the q, k, v and o projections")
    mlp_bias: bool = Field(default=False, description="biases in the MLP")
    tie_word_embeddings: bool = Field(default=True, description="the output head is the embedding table")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="probability, on embeddings and both residual branches")
    attention_dropout: float = Field(default=0.0, ge=0, lt=1, description="probability, on attention weights")
    initializer_range: float = Field(default=0.02, gt=0, description="standard deviation of initial weights")


class TransformersSection(Section):
    """Any causal language model of `transformers`, with fresh weights: AutoConfig.for_model(model_type, **config)."""

    kind: Literal["transformers"]
    model_type: str = Field(description="as in AutoConfig: llama, gpt2, gpt_neox, ...")
    vocab_size: int = Field(gt=0, le=MAX_INT, description="rows of the embedding table")
    max_position_embeddings: int = Field(gt=0, le=MAX_INT, description="longest sequence, tokens")
    config: dict[str, Any] = Field(default={}, description="the other keys of that model's config class")

    @field_validator("config", mode="before")
    @classmethod
    def _parse_config_values(cls, config: object) -> object:
        return {key: _parse_json_text(value) for key, value in config.items()} if isinstance(config, dict) else config

    @field_validator("config", mode="after")
    @classmethod
    def _check_config_values(cls, config: dict[str, Any]) -> dict[str, Any]:
        for key, value in config.items():
            most = MAX_LAYERS if "layer" in key else MAX_INT
            if type(value) is int and abs(value) > most:
                raise ValueError(f"at most {most:,} for {key}")
        json.dumps(config, allow_nan=False)  # ValueError for what is not finite
        return config


class OwnModelSection(Section):
    """A torch module of the program that trains: `smoltrain.train(config, model=...)`, and no command, can build it."""

    kind: Literal["own"] = Field(description="a module of the program that trains")
    class_name: str = Field(description="of the module, or of the function that makes it; for those who read this")
    vocab_size: int = Field(gt=0, le=MAX_INT, description="tokens that it knows, the last axis of its logits")
    max_position_embeddings: int = Field(gt=0, le=MAX_INT, description="longest sequence, tokens")


def _parse_json_text(value: object) -> object:
    """A value of a recipe, where all plain values are text, as the JSON value that the text spells, else as text."""
    if isinstance(value, dict):
        return {key: _parse_json_text(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_parse_json_text(inner) for inner in value]
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


class TokenizerSection(Section):
    """Where token ids come from. `tokenizer=NAME` on the command line is short for `tokenizer.name=NAME`."""

    name: PathText = Field(
        description="'bpe' trains a byte-level BPE on the data once; a folder with tokenizer.json; OWNER/NAME on the "
        "Hugging Face Hub; 'tiktoken:gpt2'; or 'smollm2' or 'gpt2', made without the Hub out of a package"
    )
    vocab_size: int | None = Field(default=None, gt=256, description="ids of the trained BPE; only with name 'bpe'")
    separator: str = Field(
        default="<|endoftext|>", description="special token between documents and at the end of a text"
    )
    pad: str | None = Field(
        default=None, description="special token to add behind the tokenizer's last id, for padding; packing needs none"
    )

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class SourceSection(Section):
    """Where documents come from: an installed Python package's files, files by path or URL, or a Hub dataset.

    One of the three on the command line takes the place of the recipe's.
    """

    package: PathText | None = Field(default=None, description="installed Python package whose files are the documents")
    path: PathOrUrl | None = Field(
        default=None,
        description="a .txt, .md, .jsonl, .ndjson or .parquet file (all but parquet also .gz or .zst), a folder of "
        "them, or a glob; also as http(s)://, s3:// or gs:// URL",
    )
    hub: PathText | None = Field(default=None, description="OWNER/NAME of a dataset on the Hugging Face Hub")
    hub_config: str | None = Field(
        default=None, description="the dataset's configuration (subset); null is its default"
    )
    hub_split: str = Field(default="train", description="the dataset's split")
    pattern: PathText = Field(default="**/*", description="which files of the package or folder, as a glob")
    text_field: str = Field(default="text", description="field or column of the text in .jsonl, .ndjson and .parquet")
    documents: Literal["file", "blank_lines", "separator"] = Field(
        default="file", description="how a .txt or .md file is cut: one document, or at blank lines, or at a separator"
    )
    document_separator: str = Field(
        default="<|endoftext|>", min_length=1, description="text between documents, with documents: separator"
    )
    validation_path: PathOrUrl | None = Field(
        default=None, description="files of held-out documents, as path; instead of a share of the training documents"
    )
    validation_split: str | None = Field(
        default=None, description="the Hub dataset's split of held-out documents; instead of a share"
    )


class MixedSource(SourceSection):
    """One of several sources, which share the rows of a step by weight."""

    name: Annotated[str, Field(pattern=r"^\w[\w-]*$"), CheckedPath] = Field(
        description="letters, digits, - and _; names it in phases.*.mix and logs"
    )
    weight: float = Field(gt=0, description="share of the rows, relative to the other weights")


class DataSection(SourceSection):
    """The documents of a run: one source described right here, or several under `sources`."""

    sources: tuple[MixedSource, ...] = Field(default=(), description="several sources with weights, instead of one")
    mode: Literal["auto", "stream", "cached"] = Field(
        default="auto",
        description="cached tokenises everything once before the first step; stream reads while training; auto caches "
        "local files of at most 256 MiB in all",
    )
    cache: Annotated[Path, CheckedPath] | None = Field(
        default=None, description="folder of the tokens in cached mode, which runs may share; null is the run's own"
    )
    streams: int | None = Field(
        default=None, gt=0, description="virtual streams V: they divide the rows of a step, the ranks divide them"
    )
    shuffle_rows: int = Field(default=256, gt=0, description="rows of a stream that are shuffled with each other")
    validation_share: float = Field(default=0.05, gt=0, lt=0.5, description="share of the documents held out, by hash")
    max_document_mib: float = Field(
        default=50, gt=0, le=MAX_INT, description="a longer record is a bad one; whole files may be"
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the records of a stream (cached: of a source) that may be bad and are skipped; 100 may "
        "always",
    )
    max_bad_records: int | None = Field(
        default=None, ge=0, description="how many may be bad, instead of a share; null: max_bad_share says it"
    )
    patience_s: float = Field(
        default=3600,
        ge=0,
        le=MAX_INT,
        description="seconds to try a server again that fails or is silent, before the run stops",
    )
    allow_changed: bool = Field(default=False, description="go on although the data are not those of the first start")

    @property
    def parts(self) -> tuple[MixedSource, ...]:
        """The sources, at least one: a source described right here is called 'data' and has weight 1."""
        if self.sources:
            return self.sources
        own = {key: getattr(self, key) for key in SourceSection.model_fields}
        return (MixedSource(name="data", weight=1.0, **own),)


class PackingSection(Section):
    """How documents share a row. They follow each other, a separator behind each, and are chopped into rows."""

    document_mask: bool = Field(
        default=False, description="attention and positions stay within a document; its first token is no target"
    )


class BatchSection(Section):
    """Rows of one optimizer step: micro_batch x accumulation x world, or rows_per_step outright."""

    sequence_length: int = Field(gt=1, description="targets per row, tokens")
    micro_batch: Literal["auto"] | Annotated[int, Field(gt=0, le=MAX_ROWS)] = Field(
        description="rows of one forward and backward on one rank; auto, with rows_per_step: as many as keep the "
        "device busy and are estimated to fit it"
    )
    accumulation: int | None = Field(
        default=None, gt=0, le=MAX_ROWS, description="micro-batches per step and rank at the first start"
    )
    rows_per_step: int | None = Field(
        default=None, gt=0, le=2**30, description="rows per step over all ranks; instead of accumulation"
    )

    @property
    def micro_batch_rows(self) -> int:
        """micro_batch as a number; one row where it is still `auto`, before train/resolve_auto.py has chosen."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

    def rows(self, world_size: int) -> int:
        """Rows of a step on so many ranks, at the first start."""
        return self.rows_per_step or self.micro_batch_rows * (self.accumulation or 1) * world_size


class EngineSection(Section):
    """How a step is computed; nothing here changes what is learned, beyond rounding."""

    device: Literal["auto", "cuda", "cpu", "mps"] = Field(
        default="auto", description="auto: CUDA if there is a device, else the CPU; mps is best effort, on one rank"
    )
    ds_config: HomeText = Field(default="zero2", description="a name in ds_configs/ or a path to DeepSpeed JSON")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(default="auto", description="of weights and activations")
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] | int = Field(
        default="none",
        description="recompute no block, all but matrix products and fused attention, every block, or every n-th block "
        "in the backward pass; auto: the least of it that `smoltrain estimate` sees fit",
    )
    attention: Literal["auto", "flash", "blocked", "sdpa", "math"] = Field(
        default="auto", description="kernel; auto takes the fastest; blocked is smoltrain's own for the CPU"
    )
    reduce_gradients: Literal["auto", "step", "micro_batch"] = Field(
        default="auto",
        description="when gradients are reduced under ZeRO-1 and 2: once per step, with fp32 sums of all of them on "
        "each rank, or after each micro-batch, by DeepSpeed; auto: step on a CPU",
    )
    loss: Literal["auto", "fused", "plain"] = Field(
        default="auto", description="whether the logits exist as a whole (plain), or a chunk of rows at a time"
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto", description="torch.compile; auto: where a compiler is installed and the run is long enough"
    )
    hang_s: float = Field(
        default=900.0,
        ge=0,
        le=MAX_INT,
        description="seconds without a sign of life after which all ranks leave; 0 never",
    )


class OptimizerSection(Section):
    """The update. Matrices decay; vectors (norms, biases) do not."""

    name: Literal["adamw"] = Field(default="adamw", description="adamw: Loshchilov & Hutter 2019")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment, per step")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment, per step")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    gradient_clipping: float = Field(
        default=1.0, ge=0, description="largest global L2 norm of the gradient; 0 never clips"
    )
    z_loss: float = Field(
        default=0.0, ge=0, description="weight of log(Z)^2 per token in what is minimised, not in what is logged"
    )


class PhaseSection(Section):
    """A named range of steps with its own learning rate. `schedule: continue` prolongs the end of the phase before."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$"), CheckedPath] = Field(
        description="letters, digits, - and _"
    )
    steps: int = Field(gt=0, description="optimizer steps")
    lr: float | None = Field(default=None, gt=0, description="peak learning rate; null only with schedule continue")
    weight_decay: float = Field(default=0.1, ge=0, description="decoupled decay, times lr per step")
    schedule: Literal["constant", "linear", "cosine", "wsd", "continue"] = Field(
        default="constant", description="shape of the learning rate after warm-up"
    )
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear rise to lr, within this phase")
    decay_steps: int = Field(default=0, ge=0, description="steps of wsd's final linear fall; only with wsd")
    final_lr: float = Field(default=0.0, ge=0, description="learning rate that linear, cosine and wsd fall to")
    optimizer_state: Literal["keep", "reset"] = Field(
        default="keep", description="the optimizer's state when the phase begins"
    )
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = Field(
        default=None, description="weights of data.sources in this phase, by name; null keeps their own weights"
    )


class EvaluateSection(Section):
    """Loss on the held-out documents."""

    every: int = Field(default=0, ge=0, description="steps; 0 never evaluates")
    rows: int = Field(default=64, gt=0, description="rows of validation data, the same ones each time")


class GenerationSection(Section):
    """How text is sampled from the model, during training and by `smoltrain generate`."""

    max_tokens: int = Field(default=100, gt=0, description="new tokens at most")
    temperature: float = Field(default=1.0, ge=0, description="divides the logits; 0 takes the likeliest token")
    top_k: int = Field(default=0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: float = Field(default=1.0, gt=0, le=1, description="keep the likeliest tokens that hold this probability")


class SampleSection(Section):
    """Text samples during training."""

    every: int = Field(default=0, ge=0, description="steps; 0 never samples")
    prompts: tuple[str, ...] = Field(default=("",), description="one sample each; empty starts from the separator")


class CheckpointSection(Section):
    """When a checkpoint is written and which are kept. The last step of a phase is always saved and always kept."""

    every: int = Field(default=500, ge=0, description="steps; 0 saves at the ends of phases only")
    keep_last: int = Field(default=2, gt=0, description="newest checkpoints kept beside the ends of phases")
    keep_every: int = Field(default=0, ge=0, description="steps; checkpoints at its multiples are kept too; 0 none")
    keep_best: bool = Field(default=False, description="the one of the lowest validation loss is kept too")
    background: bool = Field(
        default=True, description="training goes on while the files are written; false waits for them"
    )


class SpikesSection(Section):
    """What happens when the loss of a step is not finite, or far above those of the steps before. No update then."""

    on_spike: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="stop ends the run; skip spends the step's rows without an update; rewind goes back to the newest "
        "checkpoint and passes the guilty rows over",
    )
    deviations: float = Field(
        default=0.0, ge=0, description="a loss so many robust deviations above the median is a spike; 0: if not finite"
    )
    history: int = Field(default=128, ge=16, description="steps before it that a loss is compared with")
    window: int = Field(default=1, gt=0, description="steps whose rows a rewind passes over, the spike's the last one")
    max_times: int = Field(default=3, gt=0, description="skips in a row, or rewinds in all, before the run stops")


class TrackSection(Section):
    """What is written down. metrics.jsonl gets every step, whatever stands here."""

    print_every: int = Field(default=10, gt=0, description="steps between lines on the console")
    gradients_every: int = Field(
        default=0, ge=0, description="steps between per-layer gradient norms and histograms; 0 never"
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        default="auto", description="auto: online if a key is set and the server answers, else offline"
    )
    wandb_project: str = Field(default="smoltrain", description="W&B project")
    wandb_entity: str | None = Field(default=None, description="user or team of the W&B project; null is your default")
    wandb_id: str | None = Field(
        default=None, description="id of the run in W&B; null is one of the run folder's own, the same at every start"
    )
    wandb_name: str | None = Field(default=None, description="name that W&B shows; null is run.name")
    wandb_group: str | None = Field(default=None, description="W&B group of runs that belong together")
    wandb_tags: tuple[str, ...] = Field(default=(), description="W&B tags")
    wandb_notes: str | None = Field(default=None, description="a longer text about the run in W&B")
    wandb_model: Literal["none", "end", "phase", "checkpoint"] = Field(
        default="none",
        description="model artifact in W&B: never, at the end of the plan, of each phase, or with each checkpoint",
    )
    wandb_timeout_s: float = Field(
        default=15.0,
        gt=0,
        le=MAX_INT,
        description="seconds that training waits for an answer of W&B before it goes on without",
    )


def _model_kind(section: object) -> str:
    """Which of the classes a model section is read as; without a kind it is the decoder."""
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    return kind if kind in ("transformers", "own") else "decoder"


AnyModelSection = Annotated[
    Annotated[ModelSection, Tag("decoder")]
    | Annotated[TransformersSection, Tag("transformers")]
    | Annotated[OwnModelSection, Tag("own")],
    Discriminator(_model_kind),
]


class Config(Section):
    """One run, whole."""

    run: RunSection = RunSection()
    init: InitSection = InitSection()
    model: AnyModelSection
    tokenizer: TokenizerSection
    data: DataSection
    packing: PackingSection = PackingSection()
    batch: BatchSection
    engine: EngineSection = EngineSection()
    optimizer: OptimizerSection = OptimizerSection()
    phases: tuple[PhaseSection, ...]
    evaluate: EvaluateSection = EvaluateSection()
    generation: GenerationSection = GenerationSection()
    sample: SampleSection = SampleSection()
    checkpoint: CheckpointSection = CheckpointSection()
    spikes: SpikesSection = SpikesSection()
    track: TrackSection = TrackSection()

    @property
    def run_folder(self) -> Path:
        """runs/NAME of this run."""
        return self.run.folder / self.run.name
