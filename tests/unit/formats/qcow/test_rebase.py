"""Another name of the parent in the header's sector, byte by byte."""

from __future__ import annotations

from typing import cast

import pytest

from tapfs.disk.probe import format_named
from tapfs.driver import BackingReference, OpenRequest
from tapfs.formats.qcow.header import LENGTH
from tapfs.formats.qcow.reader import QcowReader
from tapfs.formats.qcow.rebase import rebase_plan
from tapfs.plan import Write
from tapfs.testing.model import MemoryFile
from tapfs.testing.subject import Subject

SECTOR = 512
OLD = b"/images/parent"


@pytest.mark.parametrize("place", [300, SECTOR - len(OLD)])
@pytest.mark.parametrize("name", ["/other", "/images/parenz", "/"])
def test_a_name_that_fits_replaces_the_old_one_and_nothing_beside_it(name: str, place: int) -> None:
    """In one write of one sector, which is never torn."""
    subject = Subject(format_named("qcow"), overlay=True)
    file = subject.new_file()
    old = cast("QcowReader", subject.opened(file)).header
    room = old.backing_file_size
    # The name further behind in the sector, with bytes of others beside it.
    assert old.l1_end <= 100
    file.data[100:SECTOR] = bytes(number % 251 + 1 for number in range(SECTOR - 100))
    file.data[place : place + room] = OLD
    file.data[8:20] = place.to_bytes(8, "big") + room.to_bytes(4, "big")
    before = bytes(file.data)
    image = cast("QcowReader", subject.format.open(MemoryFile(before), OpenRequest(writable=True)))
    changed = MemoryFile(before)
    plan = rebase_plan(image, BackingReference(name, "raw"))
    ((write,),) = plan.stages
    assert isinstance(write, Write)
    assert (write.host_offset, len(write.data)) == (0, SECTOR)
    changed.apply(plan)
    after = bytes(changed.data)
    assert after[place : place + room] == name.encode().ljust(room, b"\0")
    assert after[LENGTH:place] == before[LENGTH:place]
    assert after[place + room :] == before[place + room :]
    assert cast("QcowReader", subject.opened(changed)).header.backing_file_size == len(name)
