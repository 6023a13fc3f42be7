"""Edits of qcow2 images in memory: executed as tapfs does it, and refused without a change."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tapfs import ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.editable import EditableQcow2Driver
from tapfs.plan import Plan
from tapfs.testing.model import MemoryFile

Edit = Callable[[EditableQcow2Driver], Iterator[Plan]]


def driver_of(file: MemoryFile) -> EditableQcow2Driver:
    driver = FORMAT.open(file, OpenRequest(writable=True))
    assert isinstance(driver, EditableQcow2Driver)
    return driver


def done(file: MemoryFile, edit: Edit) -> None:
    """Execute an edit, one plan after the other."""
    for plan in edit(driver_of(file)):
        file.apply(plan)


def refused(file: MemoryFile, edit: Edit) -> ImageError:
    """The error of an edit, which has changed nothing."""
    before = bytes(file.data)
    with pytest.raises(ImageError) as error:
        done(file, edit)
    assert file.data == before
    return error.value
