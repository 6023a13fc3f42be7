"""Key files in the record of a block device: those of the images of a chain, for each process that serves it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tapfs.disk.password import absolute_key_file, given_password, split_key_file
from tapfs.ublk import record as records


def test_they_are_kept_for_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "directory", lambda: tmp_path)
    keys = ("/key", "/base=/key of base")
    record = records.DiskRecord(number=3, path="/top", token="", key_files=keys)
    records.write_record(record)
    assert records.read_record(3) == record


def test_names_mean_the_same_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").write_text("odd name\n")
    (tmp_path / "key").write_text("of base\n")
    absolute = [absolute_key_file(name) for name in ("a=b", "base=key")]
    assert absolute == [f"{tmp_path}/a=b", f"{tmp_path}/base={tmp_path}/key"]
    monkeypatch.chdir("/")
    assert [split_key_file(name) for name in absolute] == [
        ("", f"{tmp_path}/a=b"),
        (f"{tmp_path}/base", f"{tmp_path}/key"),
    ]
    found = given_password(absolute)
    assert found == b"odd name"
    assert found.of([f"{tmp_path}/base"]) == b"of base"  # type: ignore[union-attr]
