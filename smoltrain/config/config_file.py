"""RUN/config.yaml as a file: its name, the digest that is its last line, what it says of the run's starts."""

import hashlib
import re
from pathlib import Path
from typing import Any

from smoltrain import files
from smoltrain.config.yaml_text import read_yaml
from smoltrain.errors import Problem, UserError, format_value

RUNS_FOLDER = Path("runs")  # where runs are that are called by their name alone
CONFIG_FILE = "config.yaml"
CONFIG_DIGEST_PREFIX = "# sha256 of the lines above: "  # begins the last line of config.yaml


def find_config_damage(folder: Path) -> str | None:
    """What is wrong with the digest line of a run's config.yaml; None if nothing, or if it has none (older versions).

    A last line that holds 32 hexadecimal digits in a row is taken for a digest line whose beginning was damaged.
    """
    path = folder / CONFIG_FILE
    try:
        whole = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        return f"{path} cannot be read ({files.describe_error(error)})"
    text, mark, _ = whole.rpartition(CONFIG_DIGEST_PREFIX)
    is_intact = bool(mark) and whole == text + config_digest_line(text)
    if is_intact or not re.search(r"[0-9a-f]{32}.*\s*\Z", whole):
        return None
    return f"{path} is not what the run wrote (its last line is the digest of the others)"


def config_digest_line(text: str) -> str:
    """The last line of RUN/config.yaml: the digest of the lines above, `text`."""
    return f"{CONFIG_DIGEST_PREFIX}{hashlib.sha256(text.encode()).hexdigest()}\n"


def read_provenance(path: Path) -> dict[str, Any]:
    """What a run's config.yaml says of its starts. Errors: UserError if the run did not write it."""
    written = read_yaml(path, typed=True).get("provenance")
    want = "the config.yaml that the run wrote itself"
    if not written:
        raise UserError(Problem("the run's config has no provenance", "none", want, str(path)))
    provenance = {"run_id": "", "wandb_id": "", "starts": []} | (written if isinstance(written, dict) else {})
    rows = provenance.get("rows_per_step")
    starts = provenance["starts"]
    is_sound = (
        (type(rows) is int and rows > 0)
        and all(isinstance(provenance[key], str) for key in ("run_id", "wandb_id"))
        and (isinstance(starts, list) and all(isinstance(start, dict) for start in starts))
    )
    if not is_sound:
        raise UserError(Problem("the run's provenance is damaged", format_value(written), want, str(path)))
    return provenance
