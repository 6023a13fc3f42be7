"""JSON is valid Unicode, and no byte of a name is lost."""

from __future__ import annotations

import base64
import json
import os

import pytest

from tapfs.disk.json_text import json_text


@pytest.mark.parametrize("name", [b"plain.raw", "ä€😀".encode(), b"a\n\x1b", b""])
def test_valid_names_stay_as_they_are(name: bytes) -> None:
    text = os.fsdecode(name)
    value = {"path": text, "names": [text], "none": None, "number": 5}
    assert json.loads(json_text(value)) == {"version": 1, **value}


@pytest.mark.parametrize("name", [b"a\xff.raw", b"\xc3", b"ok\xed\xa0\x80", b"\x80" * 3])
def test_other_names_have_their_bytes_beside_them(name: bytes) -> None:
    text = os.fsdecode(name)
    found = json.loads(json_text({"chain": [{"path": text}], "names": (text,), "path": text}))
    json.dumps(found, ensure_ascii=False).encode()  # no lone surrogate anywhere
    for place in (found, found["chain"][0]):
        assert base64.b64decode(place["path_base64"]) == name
        assert "\ufffd" in place["path"]
    assert found["names"] == [found["path"]]


def test_a_surrogate_that_is_of_no_file_name() -> None:
    json.dumps(json.loads(json_text({"name": "\ud800x"})), ensure_ascii=False).encode()
