"""The marker of an export (smoltrain.json): what was exported, and the hashes of its files when they were verified.

Nothing here imports torch: what is exported already is uploaded without it.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smoltrain import files
from smoltrain.checkpoint.manifest import step_folder
from smoltrain.evaluation.results import evaluation_file
from smoltrain.inference.find_run import EXPORT_MARKER_FILE
from smoltrain.version import VERSION

if TYPE_CHECKING:
    from smoltrain.export.verify import ExportComparison

FORMAT = 1
MARKER_FIELDS: dict[str, Any] = {  # what must stand in a marker
    "format": int,
    "smoltrain": str,
    "run": str,
    "run_id": str,
    "step": int | None,
    "last_step": int | None,
    "files": dict,
}


@dataclass(frozen=True)
class ExportSource:
    """The run, step and last step that an export is made of. Two exports of one run differ in the step alone."""

    run: str
    run_id: str  # of the run folder, the same as in W&B; empty for a Hugging Face folder
    step: int | None
    last_step: int | None  # of the plan

    @property
    def unfinished_label(self) -> str | None:
        """'unfinished: step N of M' while steps of the plan are left, else None."""
        if self.step is None or self.last_step is None or self.step >= self.last_step:
            return None
        return f"unfinished: step {self.step} of {self.last_step}"


def default_export_folder(run: Path, step: int) -> Path:
    """RUN/export/step-N."""
    return step_folder(run / "export", step)


def write_export_marker(folder: Path, source: ExportSource, comparison: "ExportComparison", separator: str) -> None:
    """Mark the folder as an export that passed. Whatever is written into it later makes it an unverified one."""
    marker = {
        "format": FORMAT,
        "smoltrain": VERSION,
        **asdict(source),
        "separator": separator,
        "class": comparison.class_name,
        "num_parameters": comparison.num_parameters,
        "max_difference": comparison.max_difference,  # of a logit, from the run's own, in fp32
        "files": _hash_files(folder),
    }
    files.write_json_file(folder / EXPORT_MARKER_FILE, marker)


def read_export_marker(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself; None for a folder that has no valid marker."""
    try:
        marker = json.loads(files.read_text_file(folder / EXPORT_MARKER_FILE))
        valid = all(isinstance(marker[key], kind) for key, kind in MARKER_FIELDS.items())
        return marker if valid and marker["format"] == FORMAT else None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def read_verified_marker(folder: Path) -> dict[str, Any] | None:
    """The marker if it is valid and every file has the size and SHA-256 that it lists, else None."""
    marker = read_export_marker(folder)
    return marker if marker is not None and marker["files"] == _hash_files(folder) else None


def is_card_behind(run: Path, step: int, folder: Path) -> bool:
    """Whether tasks were measured of a run's step after it was exported, so that its card has not their results."""
    evaluation = evaluation_file(run, step)
    return evaluation.exists() and evaluation.stat().st_mtime > (folder / EXPORT_MARKER_FILE).stat().st_mtime


def _hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file but the marker."""
    hashes: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != EXPORT_MARKER_FILE:
            name = str(path.relative_to(folder))
            hashes[name] = {"bytes": path.stat().st_size, "sha256": files.file_sha256(path)}
    return hashes
