"""RUN/config.yaml as a file: its digest shows any change, its provenance is read or refused in one line."""

from pathlib import Path

import pytest

from smoltrain.config.config_file import CONFIG_FILE, config_digest_line, find_config_damage, read_provenance
from smoltrain.errors import UserError


def test_any_flip_of_a_line_or_of_the_digest_is_seen(tmp_path: Path) -> None:
    path = tmp_path / CONFIG_FILE
    text = "run: {seed: 1}\n"
    whole = (text + config_digest_line(text)).encode()
    path.write_bytes(whole)
    assert find_config_damage(tmp_path) is None
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1
        path.write_bytes(flipped)
        assert find_config_damage(tmp_path), place


def test_a_config_of_an_older_version_has_no_digest_and_one_that_is_gone_cannot_be_read(tmp_path: Path) -> None:
    assert "No such file" in str(find_config_damage(tmp_path))
    (tmp_path / CONFIG_FILE).write_text("run: {seed: 1}\n")
    assert find_config_damage(tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "provenance: 3", "provenance: [a]", "provenance: {rows_per_step: 0}", "provenance: {rows_per_step: true}",
        "provenance: {rows_per_step: 4, starts: 3}", "provenance: {rows_per_step: 4, starts: [3]}",
        "provenance: {rows_per_step: 4, run_id: 3}", "provenance: {rows_per_step: x}", "provenance: {starts: []}",
    ],
)  # fmt: skip
def test_a_damaged_provenance_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="the run's provenance is damaged") as caught:
        read_provenance(tmp_path / "config.yaml")
    assert len(str(caught.value).splitlines()) == 1
