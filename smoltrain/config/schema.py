"""The typed description of a run: every section and field of a recipe, each with its unit.

Nothing here reads a file: load.py does, and rules.py checks what no single field can see.
"""

import difflib
import json
import os
import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

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

from smoltrain.config.hub_licenses import HUB_LICENSES

# Beyond any model: what is larger is a slip, and would take all memory or time before it is refused.
MAX_INT = 2**31 - 1
MAX_LAYERS = 1_000
MAX_ROWS = 2**20  # of a micro-batch, and micro-batches of a step
MAX_SEED = 2**63 - 1  # torch takes up to 2^64 - 1, and the ranks add to it
MAX_TOKEN_DIGITS = 15
MAX_TOKENS = 10**MAX_TOKEN_DIGITS  # of a phase
MAX_EPOCHS = 1_000_000
LARGE_FIELDS = ("seed", "tokens")  # whose numbers may be larger than MAX_INT
HORIZON_KEYS = ("steps", "tokens", "epochs")  # of which a phase has one
TOKEN_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
MAX_NAME_BYTES = 200  # file systems take 255
MAX_PATH_BYTES = 4000  # file systems take 4,096


# More than two digits of exponent are beyond any run, and would take all memory.
WHOLE_NUMBER = re.compile(r"[+-]?\d+(?:_\d+)*(?:\.\d+)?(?P<exponent>[eE]\+?\d{1,2})?")


def parse_whole_number(text: str) -> int | None:
    """The whole number that a text spells, as in 5_000 or 1e4; None if it is none."""
    number = Fraction(text) if WHOLE_NUMBER.fullmatch(text) else None
    return int(number) if number is not None and number.denominator == 1 else None


def _takes_int(annotation: object) -> bool:
    """Whether a field takes whole numbers, with or beside other values, but not any number."""
    return annotation is int or (annotation is not float and any(map(_takes_int, get_args(annotation))))


class Section(BaseModel):
    """Frozen; a key that is not a field is an error, and so is a number that is not finite or beyond any run."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        serialize_by_alias=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _parse_exponent(cls, value: object, info: ValidationInfo) -> object:
        """1e4 as the whole number 10000, where one is wanted; pydantic itself takes 5_000."""
        if not isinstance(value, str) or info.field_name is None:
            return value
        if not _takes_int(cls.model_fields[info.field_name].annotation):
            return value
        found = WHOLE_NUMBER.fullmatch(value)
        number = parse_whole_number(value) if found and found["exponent"] else None
        return value if number is None else number

    @field_validator("*", mode="after")
    @classmethod
    def _check_int(cls, value: object, info: ValidationInfo) -> object:
        if type(value) is int and abs(value) > MAX_INT and info.field_name not in LARGE_FIELDS:
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


class Unit(str):
    """What a number of a key counts; config/reference.py says it behind the type."""


Steps = Annotated[int, Unit("steps")]  # of the optimizer
Rows = Annotated[int, Unit("rows")]
Tokens = Annotated[int, Unit("tokens")]
Seconds = Annotated[float, Unit("seconds")]


class RunSection(Section):
    """Where the run lives and how far it goes."""

    name: Annotated[str, Field(pattern=r"^(\w[\w.-]*)?$"), CheckedPath] = ""
    """the run's own folder, inside run.folder: letters, digits, _ . and -; empty takes the recipe's name"""
    recipe: str = ""
    """name of the recipe, for the model card of an export; empty takes that of its file"""
    folder: HomePath = Path("runs")
    """folder that holds all runs, each in a folder of its own"""
    seed: int = Field(default=1234, ge=0, le=MAX_SEED)
    """seeds the initial weights, dropout and the order of the data"""
    stop_after: str | None = None
    """name of the last phase that this start trains; null trains all that are left"""


class InitSection(Section):
    """What a new run folder begins with; fresh weights without `from`. A run with checkpoints of its own ignores it."""

    source: HomeText | None = Field(default=None, alias="from")
    """weights to begin from: a run (folder, or name under run.folder), the folder of a checkpoint, or a Hugging Face
    folder; null begins with random ones"""
    load: Literal["weights", "all"] = "weights"
    """weights alone, or all: also the step, the optimizer's state, the random states and the place in the data; all
    needs a run or a checkpoint"""


class ModelSection(Section):
    """The decoder's shape; names are those of transformers' LlamaConfig wherever it has one."""

    kind: Literal["decoder"] = "decoder"
    """decoder is smoltrain's own; transformers is any causal language model of that library"""
    vocab_size: int = Field(gt=0, le=MAX_INT)
    """rows of the embedding table: at least as many as the tokenizer has ids"""
    hidden_size: int = Field(gt=0, le=2**20)
    """width of the residual stream, which the heads divide"""
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    """blocks, each of attention and an MLP"""
    num_attention_heads: int = Field(gt=0, le=2**20)
    """query heads in each block"""
    num_key_value_heads: int = Field(gt=0, le=2**20)
    """key and value heads in each block; fewer than query heads is grouped-query attention (GQA)"""
    intermediate_size: int = Field(gt=0, le=2**24)
    """width inside the MLP of each block"""
    max_position_embeddings: Tokens = Field(gt=0, le=MAX_INT)
    """longest sequence that the model can read; at least batch.sequence_length"""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """normalisation: rmsnorm has a weight, layernorm a weight and a bias"""
    rms_norm_eps: float = Field(default=1e-5, gt=0)
    """added to the variance before its root, in either norm"""
    positions: Literal["rope", "learned"] = "rope"
    """how places are told apart: rotated queries and keys, or a table of learned vectors"""
    rope_theta: float = Field(default=10000.0, gt=0)
    """base of the rotary frequencies; only with positions: rope"""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    """swiglu is the gated MLP of Llama; gelu is that of GPT-2, in its tanh form"""
    attention_bias: bool = False
    """whether the query, key, value and output projections have biases"""
    mlp_bias: bool = False
    """whether the MLP's projections have biases"""
    tie_word_embeddings: bool = True
    """whether the output head is the embedding table itself"""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """probability to drop a value, on embeddings and both residual branches"""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """probability to drop an attention weight"""
    initializer_range: float = Field(default=0.02, gt=0)
    """standard deviation of initial weights"""


class TransformersSection(Section):
    """Any causal language model of `transformers`, with fresh weights: `AutoConfig.for_model(model_type, **config)`."""

    kind: Literal["transformers"]
    """decoder is smoltrain's own; transformers is any causal language model of that library"""
    model_type: str
    """the model's class, as AutoConfig names it: llama, gpt2, gpt_neox, ..."""
    vocab_size: int = Field(gt=0, le=MAX_INT)
    """rows of the embedding table: at least as many as the tokenizer has ids"""
    max_position_embeddings: Tokens = Field(gt=0, le=MAX_INT)
    """longest sequence that the model can read; at least batch.sequence_length"""
    config: dict[str, Any] = Field(default={})
    """the other keys of that model's config class, as hidden_size"""

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

    kind: Literal["own"]
    """a module of the program that trains"""
    class_name: str
    """of the module, or of the function that makes it; for those who read this"""
    vocab_size: int = Field(gt=0, le=MAX_INT)
    """tokens that it knows, the last axis of its logits"""
    max_position_embeddings: int = Field(gt=0, le=MAX_INT)
    """longest sequence, tokens"""


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

    name: PathText
    """bpe: a byte-level BPE, trained on the data once; a folder with tokenizer.json; OWNER/NAME on the Hugging Face
    Hub; tiktoken:gpt2; or smollm2 or gpt2, made without the Hub out of a package"""
    vocab_size: int | None = Field(default=None, gt=256)
    """how many ids the trained BPE shall have; only with name: bpe"""
    separator: str = "<|endoftext|>"
    """special token behind each document, where a generated text ends"""
    pad: str | None = None
    """special token to add behind the tokenizer's last id, for padding; packing needs none"""

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, value: object) -> object:
        return {"name": value} if isinstance(value, str) else value


class SourceSection(Section):
    """Where documents come from: an installed Python package's files, files by path or URL, or a Hub dataset.

    One of the three on the command line takes the place of the recipe's.
    """

    package: PathText | None = None
    """installed Python package whose files are the documents"""
    path: PathOrUrl | None = None
    """a .txt, .md, .jsonl, .ndjson or .parquet file (all but parquet also .gz or .zst), a folder of them, or a glob;
    also as http(s)://, s3:// or gs:// URL"""
    hub: PathText | None = None
    """OWNER/NAME of a dataset on the Hugging Face Hub"""
    hub_config: str | None = None
    """the Hub dataset's configuration (subset); null is its default"""
    hub_split: str = "train"
    """the Hub dataset's split to train on"""
    pattern: PathText = "**/*"
    """which files of the package or folder are read, as a glob"""
    text_field: str = "text"
    """field or column of the text in .jsonl, .ndjson and .parquet"""
    documents: Literal["file", "blank_lines", "separator"] = "file"
    """how a .txt or .md file is cut into documents: not at all, at blank lines, or at data.document_separator"""
    document_separator: str = Field(default="<|endoftext|>", min_length=1)
    """text between two documents of a file; only with documents: separator"""
    validation_path: PathOrUrl | None = None
    """files of held-out documents, named as path is; instead of data.validation_share"""
    validation_split: str | None = None
    """the Hub dataset's split of held-out documents; instead of data.validation_share"""


class MixedSource(SourceSection):
    """One of several sources, which share the rows of a step by weight."""

    name: Annotated[str, Field(pattern=r"^\w[\w-]*$"), CheckedPath]
    """its name in phases.*.mix and in the logs: letters, digits, - and _"""
    weight: float = Field(gt=0)
    """share of each step's rows, relative to the weights of the other sources"""


class DataSection(SourceSection):
    """The documents of a run: one source described right here, or several under `sources`."""

    sources: tuple[MixedSource, ...] = ()
    """several sources, each with a name and a weight, instead of one source right here"""
    mode: Literal["auto", "stream", "cached"] = "auto"
    """cached tokenises everything once, before the first step; stream reads while it trains; auto is cached where
    data.cache is set or the files are local and have at most 256 MiB in all, else stream; a run keeps the mode of its
    first start"""
    cache: HomePath | None = None
    """folder of the tokens in cached mode, which several runs may share; null is the run's own"""
    streams: int | None = Field(default=None, gt=0)
    """in stream mode, how many parts the documents are dealt into; it divides the rows of a step, and the number of
    ranks divides it; null: the largest up to 64 that fits; a run keeps the number of its first start"""
    shuffle_rows: Rows = Field(default=256, gt=0)
    """in stream mode, how many rows of a stream are shuffled with each other"""
    validation_share: float = Field(default=0.05, gt=0, lt=0.5)
    """share of the documents that is held out for validation, chosen by their hash"""
    max_document_mib: float = Field(default=50, gt=0, le=MAX_INT)
    """longest record, in MiB; a longer one counts as bad; a file that is one document may be longer"""
    max_bad_share: float = Field(default=0.01, ge=0, le=1)
    """share of the records of a stream (in cached mode: of a source) that may be bad, and are then skipped; 100 always
    may"""
    max_bad_records: int | None = Field(default=None, ge=0)
    """how many records may be bad, instead of a share; null: data.max_bad_share counts"""
    patience_s: Seconds = Field(default=3600, ge=0, le=MAX_INT)
    """how long a server that fails or is silent is tried again, before the run stops"""
    allow_changed: bool = False
    """whether a run goes on although its data are not those of its first start"""

    @property
    def parts(self) -> tuple[MixedSource, ...]:
        """The sources, at least one: a source described right here is called 'data' and has weight 1."""
        if self.sources:
            return self.sources
        own = {key: getattr(self, key) for key in SourceSection.model_fields}
        return (MixedSource(name="data", weight=1.0, **own),)


class PackingSection(Section):
    """How documents share a row. They follow each other, a separator behind each, and are chopped into rows."""

    document_mask: bool = False
    """whether attention and positions stay within a document; its first token is then no target"""


class BatchSection(Section):
    """Rows of one optimizer step: micro_batch x accumulation x world, or rows_per_step outright."""

    sequence_length: Tokens = Field(gt=1)
    """length of a row: how many tokens are predicted in it"""
    micro_batch: Literal["auto"] | Annotated[Rows, Field(gt=0, le=MAX_ROWS)]
    """how many rows go through the model at once on one rank; auto, only with batch.rows_per_step: as many as keep the
    device busy and are estimated to fit it"""
    accumulation: int | None = Field(default=None, gt=0, le=MAX_ROWS)
    """gradient accumulation: micro-batches of a step on each rank, at the first start; a step so has more rows with
    more ranks"""
    rows_per_step: Rows | None = Field(default=None, gt=0, le=2**30)
    """rows of a step over all ranks, however many there are; instead of batch.accumulation"""

    @property
    def micro_batch_rows(self) -> int:
        """micro_batch as a number; one row where it is still `auto`, before training/resolve_auto.py has chosen."""
        return 1 if self.micro_batch == "auto" else self.micro_batch

    def rows(self, world_size: int) -> int:
        """Rows of a step on so many ranks, at the first start."""
        return self.rows_per_step or self.micro_batch_rows * (self.accumulation or 1) * world_size


class EngineSection(Section):
    """How a step is computed; nothing here changes what is learned, beyond rounding."""

    device: Literal["auto", "cuda", "cpu", "mps"] = "auto"
    """auto is CUDA if there is a device, else the CPU; mps is best effort, on one rank"""
    ds_config: HomeText = "zero2"
    """DeepSpeed's config: zero0, zero1, zero2, zero2_fp16, zero2_offload, zero3, or a path to a .json file"""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """number format of weights and activations; master weights stay fp32; auto: the fastest of the device, bf16 on GPUs
    that have it, on a CPU only where it is known to be faster"""
    gradient_checkpointing: Literal["auto", "none", "selective", "full"] | int = "none"
    """what is recomputed in the backward pass instead of kept: nothing, all but matrix products and fused attention
    (selective), every block (full) or every n-th; auto: the least that is estimated to fit"""
    attention: Literal["auto", "flash", "blocked", "sdpa", "math"] = "auto"
    """attention kernel; auto takes the fastest there is; blocked is smoltrain's own for the CPU"""
    reduce_gradients: Literal["auto", "step", "micro_batch"] = "auto"
    """when gradients are summed over the ranks under ZeRO-1 and 2: once per step, with fp32 sums of all of them on each
    rank, or after each micro-batch, by DeepSpeed; auto: step, but not on a GPU whose memory is estimated to have no
    room for the sums"""
    loss: Literal["auto", "fused", "plain"] = "auto"
    """whether the logits of a micro-batch exist as a whole (plain), or a chunk of rows at a time (fused)"""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on where a compiler is installed and the run is long enough to gain from it"""
    compile_region: Literal["block", "model"] = "block"
    """what torch.compile sees at once: a block, which all blocks share, or all blocks and the last norm (model), which
    takes longer to compile and lets it join what lies between two blocks"""
    cuda_graphs: bool = False
    """whether a GPU replays a micro-batch's compiled kernels as recorded CUDA graphs, one launch forward and one
    backward; needs compile=on, compile_region=model, and gradients that are reduced once per step"""
    fused_projections: bool = False
    """whether q, k and v are one matrix product, and gate and up, over weights that ZeRO-1 and 2 lay side by side;
    weights keep their names"""
    hang_s: Seconds = Field(default=900.0, ge=0, le=MAX_INT)
    """how long a rank may give no sign of life before all ranks leave; 0 waits for ever"""
    lost_host_s: Seconds = Field(default=45.0, ge=0, le=86_400)
    """how long a machine may answer nothing, not even its kernel, before it counts as lost and all ranks leave; 0 waits
    for ever"""


class OptimizerSection(Section):
    """The update. Matrices decay; vectors (norms, biases) do not. `optimizer=muon` is short for `optimizer.kind=muon`.

    With kind: muon, beta1, beta2 and eps are those of the parameters that adamw updates.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    """adamw is that of Loshchilov & Hutter 2019; muon (Jordan et al. 2024) orthogonalises the update of each hidden
    matrix, and leaves embeddings, head and vectors to adamw"""
    momentum: float = Field(default=0.95, ge=0, lt=1)
    """decay of muon's momentum (mean of the gradients), per step; only with kind: muon"""
    newton_schulz_steps: int = Field(default=5, gt=0, le=20)
    """iterations by which muon orthogonalises; fewer are cheaper and rougher; only with kind: muon"""
    embedding_lr_factor: float = Field(default=1.0, gt=0)
    """learning rate of embeddings and head, as a multiple of lr; only with kind: muon"""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    """decay of adamw's first moment (mean of the gradients), per step"""
    beta2: float = Field(default=0.95, ge=0, lt=1)
    """decay of adamw's second moment (mean of their squares), per step"""
    eps: float = Field(default=1e-8, gt=0)
    """added to the root of adamw's second moment, by which its update is divided"""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """largest L2 norm of the whole gradient; a longer one is scaled down to it; 0 never clips"""
    z_loss: float = Field(default=0.0, ge=0)
    """weight of log(Z)^2 per token, Z the softmax's denominator, in what is minimised; the logged loss is without"""


def parse_token_count(value: object) -> object:
    """A count of tokens as people write it (3.2e9, 400M, 1.5B, 5_000_000) as an int; no text or number stays as it is.

    Errors: ValueError for what is no count.
    """
    if isinstance(value, bool) or not isinstance(value, str | float):
        return value
    want = "a number of tokens, as in 5_000_000, 3.2e9, 400M or 1.5B"
    text = str(value).strip().replace("_", "")
    unit = text[-1:].upper() if text[-1:].isalpha() else ""
    try:
        number = Decimal(text.removesuffix(text[-1:]) if unit else text)
    except InvalidOperation:
        raise ValueError(want) from None
    if unit not in TOKEN_UNITS or not number.is_finite():
        raise ValueError(want)
    if number.adjusted() > MAX_TOKEN_DIGITS:  # before it is multiplied: 1e999999999 has a billion digits
        raise ValueError(f"at most {MAX_TOKENS:,}")
    number *= TOKEN_UNITS[unit]
    if number != number.to_integral_value():
        raise ValueError("a whole number of tokens")
    return int(number)


class PhaseSection(Section):
    """A named stretch of the plan with its own learning rate. `schedule: continue` prolongs the end of the one before.

    A recipe says how long it is in steps, tokens or epochs; a run that has begun knows it in steps
    (schedule.py: resolve_horizons).
    """

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9_-]+$"), CheckedPath]
    """letters, digits, - and _"""
    steps: Steps | None = Field(default=None, gt=0)
    """optimizer steps; instead of them tokens, or epochs"""
    tokens: Tokens | None = Field(default=None, gt=0, le=MAX_TOKENS)
    """tokens to train on, as in 3.2e9, 400M or 1.5B; rounded up to whole steps"""
    epochs: float | None = Field(default=None, gt=0, le=MAX_EPOCHS)
    """passes over the training tokens; for one source that is tokenised before the first step"""
    lr: float | None = Field(default=None, gt=0)
    """peak learning rate; null only with schedule continue"""
    weight_decay: float = Field(default=0.1, ge=0)
    """decoupled weight decay: a step takes lr times this share off each weight that decays"""
    schedule: Literal["constant", "linear", "cosine", "wsd", "continue"] = "constant"
    """the learning rate after warm-up: constant; a line or a cosine down to final_lr; wsd: constant, then a line down;
    continue: the end of the phase before"""
    warmup_steps: Steps = Field(default=0, ge=0)
    """how long lr rises from 0 in a line, within this phase"""
    decay_steps: Steps = Field(default=0, ge=0)
    """how long wsd falls at its end; only with schedule: wsd"""
    final_lr: float = Field(default=0.0, ge=0)
    """learning rate at the end of the phase, to which linear, cosine and wsd fall"""
    optimizer_state: Literal["keep", "reset"] = "keep"
    """whether the optimizer's state lives on when the phase begins, or is set to 0"""
    mix: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """weights of data.sources in this phase, by name; null takes their own weights"""

    _parse_tokens = field_validator("tokens", mode="before")(parse_token_count)

    @property
    def num_steps(self) -> int:
        """Optimizer steps. Errors: ValueError where the recipe says tokens or epochs, which nobody has resolved yet."""
        if self.steps is None:
            raise ValueError(f"phase {self.name} has no steps: resolve_horizons comes first")
        return self.steps

    @property
    def horizon(self) -> dict[str, int | float]:
        """How long it is to be, by the key that says it: one of steps, tokens and epochs."""
        given = {key: getattr(self, key) for key in HORIZON_KEYS}
        return {key: value for key, value in given.items() if value is not None}


class EvaluateSection(Section):
    """Loss on the held-out documents."""

    every: Steps = Field(default=0, ge=0)
    """how often the validation loss is measured; 0 never"""
    rows: Rows = Field(default=64, gt=0)
    """how many rows of validation data at most, the same ones each time; a run that streams keeps as many as its first
    start held out"""
    tasks: tuple[str, ...] = ()
    """tasks to measure too, as lm-evaluation-harness (the extra `eval`) names them, or smoltrain_sentences"""
    tasks_every: Steps = Field(default=0, ge=0)
    """how often the tasks are measured; 0 never"""
    tasks_limit: int | None = Field(default=None, gt=0)
    """documents of each task at most, the first ones; null takes all"""
    memorisation_every: Steps = Field(default=0, ge=0)
    """how often it is measured how much of what the model writes stands in the training tokens; 0 never; each time
    reads all of them once, so only where they are cached"""


class GenerationSection(Section):
    """How text is sampled from the model, during training and by `smoltrain generate`."""

    max_tokens: Tokens = Field(default=100, gt=0)
    """how many new tokens at most"""
    temperature: float = Field(default=1.0, ge=0)
    """divides the logits: below 1 is surer, above 1 wilder; 0 takes the likeliest token"""
    top_k: int = Field(default=0, ge=0)
    """draw from the k likeliest tokens; 0 draws from all"""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """draw from the fewest likeliest tokens that together have this probability; 1 draws from all"""


class SampleSection(Section):
    """Text samples during training."""

    every: Steps = Field(default=0, ge=0)
    """how often texts are sampled; 0 never"""
    prompts: tuple[str, ...] = ("",)
    """texts to go on from, one sample each; an empty one begins a new document"""


def _check_language(code: str) -> str:
    if not re.fullmatch("[a-z]{2,3}|code|multilingual", code):
        raise ValueError("a code of ISO 639, as en or de; or code, or multilingual")
    return code


class ExportSection(Section):
    """What the model card of an export says that its author alone knows. What is not given here is left out there."""

    license: str | None = None
    """licence of the weights, as the Hugging Face Hub names it: apache-2.0, mit, cc-by-4.0, ...; other with
    export.license_name"""
    license_name: str | None = Field(default=None, min_length=1)
    """name of a licence that the Hub does not list; with license: other"""
    language: tuple[Annotated[str, AfterValidator(_check_language)], ...] = ()
    """languages of the text, as ISO 639 codes: en, de, ...; also code and multilingual"""

    @field_validator("license", mode="after")
    @classmethod
    def _check_license(cls, license: str | None) -> str | None:
        if license is not None and license not in HUB_LICENSES:
            near = difflib.get_close_matches(license.lower(), HUB_LICENSES, 3)
            hint = ", ".join(near or ("apache-2.0", "mit"))
            raise ValueError(f"a licence that the Hub lists, as {hint}; or license=other with license_name")
        return license

    @model_validator(mode="after")
    def _check_license_name(self) -> "ExportSection":
        if (self.license == "other") != (self.license_name is not None):
            raise ValueError("license_name where license is other, and nowhere else")
        return self


class CheckpointSection(Section):
    """When a checkpoint is written and which are kept. The last step of a phase is always saved and always kept."""

    every: Steps = Field(default=500, ge=0)
    """how often a checkpoint is written; 0 at the ends of phases only"""
    keep_last: int = Field(default=2, gt=0)
    """how many of the newest checkpoints are kept, beside the ends of phases"""
    keep_every: Steps = Field(default=0, ge=0)
    """checkpoints at multiples of it are kept too; 0 none"""
    keep_best: bool = False
    """whether the checkpoint of the lowest validation loss is kept too"""
    background: bool = True
    """whether training goes on while the files are written; false waits for them"""
    shared: Literal["auto", "off"] = "auto"
    """auto: run.folder must be shared by all machines; off: each has its own, what training needs is sent to it at the
    start, and its part of a checkpoint to the first machine, for which training waits"""


class SpikesSection(Section):
    """What happens when the loss of a step is not finite, or far above those of the steps before. No update then."""

    on_spike: Literal["stop", "skip", "rewind"] = "stop"
    """stop ends the run; skip passes the step's rows over without an update; rewind goes back to the newest checkpoint
    and passes the guilty rows over"""
    deviations: float = Field(default=0.0, ge=0)
    """a loss so many robust deviations above the median of the steps before is a spike; 0: only one that is not
    finite"""
    history: Steps = Field(default=128, ge=16)
    """how many steps before it a loss is compared with"""
    window: Steps = Field(default=1, gt=0)
    """how many steps' rows a rewind passes over, those of the spike the last ones"""
    max_times: int = Field(default=3, gt=0)
    """skips in a row, or rewinds in all, before the run stops"""


class TrackSection(Section):
    """What is written down. metrics.jsonl gets every step, whatever stands here."""

    print_every: Steps = Field(default=10, gt=0)
    """how often a line is printed on the console"""
    gradients_every: Steps = Field(default=0, ge=0)
    """how often each layer's gradient norm and histogram, weight norm and update are recorded; 0 never"""
    to: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = ("wandb",)
    """where all numbers go beside metrics.jsonl, any of them: wandb, tensorboard, mlflow"""
    wandb: Literal["auto", "online", "offline", "off"] = "auto"
    """Weights & Biases: auto is online if a key is set and the server answers, else offline"""
    wandb_project: str = "smoltrain"
    """project in W&B"""
    wandb_entity: str | None = None
    """user or team of the W&B project; null is your default"""
    wandb_id: str | None = None
    """id of the run in W&B; null is one of the run folder's own, the same at every start"""
    wandb_name: str | None = None
    """name that W&B shows for the run; null is run.name"""
    wandb_group: str | None = None
    """group in W&B, of runs that belong together"""
    wandb_tags: tuple[str, ...] = ()
    """tags of the run in W&B"""
    wandb_job_type: str = "train"
    """job type that W&B shows for the run"""
    wandb_notes: str | None = None
    """a longer text about the run in W&B"""
    wandb_model: Literal["none", "end", "phase", "checkpoint"] = "none"
    """when the model is uploaded to W&B as an artifact: never, at the end of the plan, at that of each phase, or with
    each checkpoint"""
    wandb_code: bool = False
    """whether smoltrain's own sources go to W&B as an artifact"""
    wandb_timeout_s: Seconds = Field(default=15.0, gt=0, le=MAX_INT)
    """how long training waits for an answer of W&B before it goes on without it"""


MODEL_SECTIONS = {"decoder": ModelSection, "transformers": TransformersSection, "own": OwnModelSection}  # by kind


def model_kind(section: object) -> str:
    """Which of the classes a model section is read as; without a kind it is the decoder."""
    kind = section.get("kind") if isinstance(section, dict) else getattr(section, "kind", None)
    return kind if isinstance(kind, str) and kind in MODEL_SECTIONS else "decoder"


AnyModelSection = Annotated[
    Annotated[ModelSection, Tag("decoder")]
    | Annotated[TransformersSection, Tag("transformers")]
    | Annotated[OwnModelSection, Tag("own")],
    Discriminator(model_kind),
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
    export: ExportSection = ExportSection()
    checkpoint: CheckpointSection = CheckpointSection()
    spikes: SpikesSection = SpikesSection()
    track: TrackSection = TrackSection()

    @property
    def run_folder(self) -> Path:
        """runs/NAME of this run."""
        return self.run.folder / self.run.name
