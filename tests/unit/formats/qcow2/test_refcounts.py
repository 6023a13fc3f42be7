"""Places for refcount blocks and for a larger table of them, kept before the counts need them."""

from __future__ import annotations

from itertools import count

import pytest

from tapfs import ErrorKind, ImageError
from tapfs.driver import OpenRequest
from tapfs.formats.qcow2 import FORMAT
from tapfs.formats.qcow2.reader import Qcow2Reader
from tapfs.formats.qcow2.refcounts import Refcounts
from tapfs.testing.model import MemoryFile
from tests.qcow2_images import make

CLUSTER = 4096
#: Bytes whose clusters one block counts.
COUNTED = CLUSTER // 2 * CLUSTER


@pytest.mark.parametrize("calls", range(6))
def test_a_place_that_cannot_be_had_leaves_nothing_kept_that_has_no_count(calls: int) -> None:
    file = make("overlay", 1 << 20, 1)[0]
    reader = FORMAT.open(MemoryFile(bytes(file.data)), OpenRequest())
    assert isinstance(reader, Qcow2Reader)
    refcounts = Refcounts(reader.file, reader.header._replace(reftable_offset=0, reftable_clusters=0))
    numbers = count(1)

    def allocate(clusters: int) -> int:
        """Each place is counted in another block, until the sixth."""
        number = next(numbers)
        if number == calls:
            raise ImageError(ErrorKind.NO_SPACE, "full", path="image", op="allocate")
        return min(number, 6) * COUNTED + number * CLUSTER * clusters

    if calls:
        with pytest.raises(ImageError, match="full"):
            refcounts.ensure(0, 1, allocate)
    refcounts.ensure(0, 1, allocate)
    assert all(space.length for space in refcounts.metadata(0, 1))
    refcounts.raise_counts(0, 1)
    assert refcounts.get(0) == 1
