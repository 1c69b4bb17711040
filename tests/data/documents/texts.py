"""A folder of twelve texts, and what is prepared of it."""

import json
from pathlib import Path
from typing import Any

from smoltrain.config.schema import Config
from smoltrain.data.tokens.prepare import prepare_run_data
from smoltrain.data.tokens.prepared import PreparedData
from tests.data.tokens.test_tokenise import given, split


def text(i: int) -> str:
    return f"This is document {i:02}. " * 10


def lines(*numbers: int) -> str:
    return "".join(json.dumps({"text": text(i)}) + "\n" for i in numbers)


def prepared_of(root: Path, mode: str = "cached", **changes: Any) -> PreparedData:
    return prepare_run_data(config(root, mode, **changes))


def config(root: Path, mode: str = "cached", **changes: Any) -> Config:
    made = given(root, data__mode=mode, **({"data__streams": 2} if mode == "stream" else {}), **changes)
    return made.model_copy(update={"evaluate": made.evaluate.model_copy(update={"every": 1, "rows": 3})})


def sides(prepared: PreparedData, number: int = 0) -> tuple[list[str], list[str]]:
    return split(prepared, prepared.train[number]), split(prepared, prepared.validation[number])


def both(prepared: PreparedData, number: int = 0) -> list[str]:
    train, validation = sides(prepared, number)
    return train + validation
