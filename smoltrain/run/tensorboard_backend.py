"""A run for TensorBoard: event files in RUN/tensorboard, by torch's own writer. The only importer of tensorboard.

`tensorboard --logdir runs` shows all runs of a folder, each by its name.
"""

import threading
from collections.abc import Mapping
from typing import Any

from smoltrain.config.yaml_text import dump_yaml
from smoltrain.engine.layer_gradients import LayerGradient
from smoltrain.run.sink import HISTOGRAM_PREFIX, BackendStart

TENSORBOARD_FOLDER = "tensorboard"
FLUSH_S = 30  # between two writes to the disk
WRITER_MODULE = "tensorboard.summary.writer.event_file_writer"  # whose thread writes to the disk
MAX_QUEUE = 1000  # events that may wait for the disk; a step has about 30


class TensorBoardBackend:
    """A Backend, see sink.py. Events of later steps than it begins with are hidden from TensorBoard."""

    def __init__(self, start: BackendStart) -> None:
        from torch.utils.tensorboard import SummaryWriter

        _hush_writer_thread()
        folder = start.folder.path / TENSORBOARD_FOLDER
        # From the step on at which a process began, TensorBoard hides what earlier files of the folder have: if that is
        # not the first mark of the kind, so that the first file has one too.
        purge_step = start.last_step + 1
        self._writer: Any = SummaryWriter(str(folder), purge_step=purge_step, max_queue=MAX_QUEUE, flush_secs=FLUSH_S)
        self._writer.add_text("config", _as_code(dump_yaml(start.facts)), start.last_step + 1)
        self.kept_step = start.last_step
        self.description = f"{folder}; `tensorboard --logdir {start.folder.path.parent}` shows it"

    def log(self, step: int, numbers: Mapping[str, float], time_s: float | None) -> None:
        """See Backend."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def log_histograms(self, step: int, layers: dict[str, LayerGradient]) -> None:
        """See Backend."""
        for name, layer in layers.items():
            centres = (layer.edges[1:] + layer.edges[:-1]) / 2
            self._writer.add_histogram_raw(
                HISTOGRAM_PREFIX + name, min=float(layer.edges[0]), max=float(layer.edges[-1]),
                num=int(layer.counts.sum()),
                sum=float(layer.counts @ centres),  # of the bins, not of the entries: TensorBoard shows it nowhere
                sum_squares=layer.norm**2, bucket_limits=layer.edges[1:].tolist(), bucket_counts=layer.counts.tolist(),
                global_step=step,
            )  # fmt: skip

    def log_samples(self, step: int, samples: list[tuple[str, str]]) -> None:
        """See Backend. As code, since TensorBoard reads texts as Markdown."""
        for i, (prompt, text) in enumerate(samples):
            self._writer.add_text(f"samples/{i}", _as_code(prompt + text), step)

    def flush(self) -> None:
        """See Backend."""
        self._writer.flush()

    def close(self, exit_code: int) -> None:  # noqa: ARG002
        """See Backend."""
        self._writer.close()


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "".join(f"    {line}\n" for line in text.splitlines())


def _hush_writer_thread() -> None:
    """Print no traceback when TensorBoard's thread ends by an error: the next call raises it, and it is said then."""
    before = threading.excepthook
    if getattr(before, "hushes_tensorboard", False):
        return

    def hook(error: threading.ExceptHookArgs) -> None:
        if type(error.thread).__module__ != WRITER_MODULE:
            before(error)

    hook.hushes_tensorboard = True  # pyright: ignore[reportFunctionMemberAccess]
    threading.excepthook = hook
