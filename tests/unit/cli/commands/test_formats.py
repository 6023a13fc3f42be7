"""`tapfs formats` says of each format what the format then does."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tapfs.disk.chain import OpenOptions, open_layer
from tapfs.disk.probe import format_named, format_names, own_format_names
from tapfs.driver import Checkable, CreatableFormat, Driver, Resizable, Streamable, WritableDriver
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.create import NewImage, create_image

Run = Callable[..., Any]


def _listed(tapfs: Run) -> dict[str, dict[str, object]]:
    ran = tapfs("formats", "--json")
    assert (ran.code, ran.err) == (0, "")
    return {each["name"]: each for each in json.loads(ran.out)["formats"]}


def _image(tmp_path: Path, ram_name: str, name: str) -> str:
    return ram_name if name == "ram" else str(tmp_path / f"a.{name}")


def _makes(path: str, new: NewImage) -> bool:
    """Whether such an image can be made."""
    try:
        create_image(path, new, overwrite=True)
    except ImageError as error:
        if error.kind is not ErrorKind.UNSUPPORTED:
            raise
        return False
    return True


def test_all_formats_are_listed(tapfs: Run) -> None:
    assert tuple(_listed(tapfs)) == format_names()
    lines = tapfs("formats").out.splitlines()
    assert lines[0].split() == [
        "FORMAT",
        "READ",
        "WRITE",
        "CREATE",
        "PARENT",
        "PACK",
        "CRYPT",
        "CHECK",
        "REPAIR",
        "SNAP",
        "RESIZE",
    ]
    assert lines[1].split() == ["raw", *["yes"] * 3, *["no"] * 6, "yes"]
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize(
    "name", [each for each in own_format_names() if isinstance(format_named(each), CreatableFormat)]
)
def test_what_is_said_is_true(tapfs: Run, tmp_path: Path, ram_name: str, name: str) -> None:
    said = _listed(tapfs)[name]
    path = _image(tmp_path, ram_name, name)
    parent = tmp_path / "parent.raw"
    parent.write_bytes(bytes(1 << 20))
    quick = {"luks": {"iter-time": "1"}, "qcow2": {"encrypt.iter-time": "1"}}.get(name, {})
    secret = NewImage(format=name, size=1 << 20, options=quick, password=b"x")
    assert said["encrypt"] == _makes(path, secret)
    always = name == "luks"  # then nothing is made without a password
    over_raw = NewImage(format=name, size=1 << 20, backing=str(parent), backing_format="raw")
    # Of some formats the parent of an image is of the same format.
    own = str(tmp_path / "parent.own")
    over_own = NewImage(format=name, size=1 << 20, backing=own, backing_format=name)
    has_own = name != "ram" and not always and _makes(own, NewImage(format=name, size=1 << 20))
    assert said["backing"] == (_makes(path, over_raw) or (has_own and _makes(path, over_own)))
    assert said["create"] == _makes(path, secret if always else NewImage(format=name, size=1 << 20))
    layer = open_layer(path, OpenOptions(format=name, writable=True))
    with closing(layer.file):
        driver: Driver = layer.driver
        assert said["resize"] == isinstance(driver, Resizable)
        assert said["write"] == isinstance(driver, WritableDriver)
        # Of some formats only images of a certain kind can be filled as a stream, but then those of the format can be.
        assert said["compress"] or not isinstance(driver, Streamable)
        assert said["check"] == said["repair"] == isinstance(driver, Checkable)
    options = getattr(format_named(name), "create_options", {})
    assert said["options"] == dict(options)


def test_a_format_that_does_not_say(tapfs: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent:
        name = "silent"

        def probe(self, _head: bytes, _size: int) -> int:
            return 0

        def open(self, file: object, request: object) -> Driver:
            raise NotImplementedError

    monkeypatch.setattr("tapfs.disk.probe.format_names", lambda: ("raw", "silent"))
    monkeypatch.setattr(
        "tapfs.disk.probe.format_named", lambda name: format_named("raw") if name == "raw" else Silent()
    )
    assert tapfs("formats").out.splitlines()[2].split() == ["silent", "yes", "-", "no", *["-"] * 7]
    said = _listed(tapfs)["silent"]
    assert (said["read"], said["create"], said["write"]) == (True, False, None)
