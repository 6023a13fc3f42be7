"""Every writable format behaves like an array of bytes: written, zeroed, flushed, reopened.

A stateful model (hypothesis) drives an Image and a bytearray side by side, the engine and
real files included. Discarded ranges may read as they did or as zeros; the model then takes
what it sees.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

import tapfs
from tapfs.host import ram
from tapfs.kernel._engine import ffi
from tapfs.kernel.writes import Segments

if TYPE_CHECKING:
    from tapfs.kernel._engine import CData

SIZE = 5 * 1024 * 1024 + 2560
PARENT_SIZE = SIZE - 3 * 1024 * 1024 - 1000

#: name: (format, -o options, over a parent, password)
KINDS: dict[str, tuple[str, dict[str, str], bool, bytes | None]] = {
    "raw": ("raw", {}, False, None),
    "ram": ("ram", {}, False, None),
    "qcow": ("qcow", {}, False, None),
    "qcow-64k": ("qcow", {"cluster_size": "65536"}, False, None),
    "qcow-blktap": ("qcow", {"blktap": "on"}, False, None),
    "qcow-overlay": ("qcow", {}, True, None),
    "qcow-blktap-overlay": ("qcow", {"blktap": "on"}, True, None),
    "qcow2": ("qcow2", {"cluster_size": "4096"}, False, None),
    "qcow2-subclusters-overlay": ("qcow2", {"cluster_size": "16384", "extended_l2": "on"}, True, None),
    "qcow-aes": ("qcow", {}, False, b"secret"),
    "qcow-aes-overlay": ("qcow", {}, True, b"secret"),
}

ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 3 * 1024 * 1024)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
short_ranges = st.tuples(st.integers(0, SIZE), st.integers(0, 9000)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
aligned_ranges = st.tuples(st.integers(0, SIZE // 4096), st.integers(0, 300)).map(
    lambda pair: (pair[0] * 4096, min(pair[1] * 4096, SIZE - pair[0] * 4096))
)
#: In and around the last granule, which the end of the disk cuts.
last_ranges = st.tuples(st.integers(SIZE - 5000, SIZE), st.sampled_from((0, 1, 512, 5000))).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
any_range = st.one_of(short_ranges, aligned_ranges, ranges, last_ranges)


class ImageModel(RuleBasedStateMachine):
    kind: str
    direct = False

    @initialize(seed=st.integers(0, 255))
    def create(self, seed: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tapfs-model-"))
        self.format, options, over_parent, self.password = KINDS[self.kind]
        self.name = f"ram:model-{secrets.token_hex(8)}" if self.format == "ram" else str(self.folder / "image")
        self.bytes = bytearray(SIZE)
        backing = None
        if over_parent:
            backing = str(self.folder / "parent.raw")
            content = bytes((seed + i // 700) % 251 for i in range(PARENT_SIZE))
            Path(backing).write_bytes(content)
            self.bytes[:PARENT_SIZE] = content
        tapfs.create(self.name, self.format, SIZE, backing=backing, options=options, password=self.password)
        self.open()

    def open(self) -> None:
        self.image = tapfs.open(
            self.name, format=self.format, writable=True, password=self.password, direct=self.direct
        )

    @rule(where=any_range, byte=st.integers(0, 255))
    def write(self, where: tuple[int, int], byte: int) -> None:
        offset, length = where
        data = bytes([byte, byte ^ 0x55, offset % 251]) * (length // 3 + 1)
        self.image.write(offset, data[:length])
        self.bytes[offset : offset + length] = data[:length]

    @rule(runs=st.lists(short_ranges, min_size=1, max_size=12), byte=st.integers(0, 255))
    def write_segments(self, runs: list[tuple[int, int]], byte: int) -> None:
        """Runs that lie apart, some of them in one granule, in one write."""
        memory = ffi.new("uint8_t[]", bytes((byte + i) % 256 for i in range(9000)))
        segments: list[tuple[int, int, CData]] = []
        for offset, length in sorted(runs):
            if not segments or segments[-1][0] + segments[-1][1] <= offset:
                segments.append((offset, length, memory))
                self.bytes[offset : offset + length] = ffi.buffer(memory, length)[:]
        self.image.write_segments(Segments(segments))

    @rule(where=any_range)
    def write_zeroes(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.image.write_zeroes(offset, length)
        self.bytes[offset : offset + length] = bytes(length)

    @rule(where=any_range)
    def discard(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.image.discard(offset, length)
        seen = self.image.read(offset, length)
        before = self.bytes[offset : offset + length]
        assert all(new in (old, 0) for new, old in zip(seen, before, strict=True))
        self.bytes[offset : offset + length] = seen

    @rule(where=any_range, cut=st.integers(0, 3 * 1024 * 1024))
    def read(self, where: tuple[int, int], cut: int) -> None:
        offset, length = where
        expected = self.bytes[offset : offset + length]
        assert self.image.read(offset, length) == expected
        cut = min(cut, length)
        assert self.image.read(offset, cut) + self.image.read(offset + cut, length - cut) == expected

    @rule()
    def flush(self) -> None:
        self.image.flush()

    @rule()
    def reopen(self) -> None:
        self.image.close()
        report = tapfs.check(self.name, format=self.format)
        assert not report.corruptions, report.findings
        self.open()

    @rule()
    def map_laws(self) -> None:
        runs = list(self.image.extents())
        assert runs[0].offset == 0
        assert runs[-1].end == SIZE
        assert all(left.end == right.offset for left, right in pairwise(runs))
        for run in runs:
            if run.zero:
                assert not any(self.bytes[run.offset : run.end]), run

    @invariant()
    def size_is_kept(self) -> None:
        if hasattr(self, "image"):
            assert self.image.size == SIZE

    def teardown(self) -> None:
        if not hasattr(self, "folder"):
            return
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(shutil.rmtree, self.folder)
            if self.format == "ram":
                cleanup.callback(ram.remove, self.name)
            if hasattr(self, "image"):
                assert self.image.read(0, SIZE) == self.bytes
                self.image.close()
                with tapfs.open(self.name, format=self.format, password=self.password) as image:
                    assert image.read(0, SIZE) == self.bytes


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_an_array_of_bytes(kind: str) -> None:
    machine: Any = type("Model", (ImageModel,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@pytest.mark.parametrize("kind", ["raw", "qcow", "qcow-aes-overlay"])
def test_an_image_is_an_array_of_bytes_by_direct_io(kind: str) -> None:
    machine: Any = type("Model", (ImageModel,), {"kind": kind, "direct": True})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=8, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
