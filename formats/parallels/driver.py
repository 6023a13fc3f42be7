"""Open, map and check a Parallels image, which is only read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tapfs.driver import (
    BackingReference,
    CheckReport,
    HostFile,
    OpenRequest,
    ProgressCallback,
    Role,
    Severity,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.blocks.check import BlockCheck
from tapfs.formats.blocks.layout import BlockLayout
from tapfs.formats.blocks.reader import BlockReader
from tapfs.formats.claims import Claim
from tapfs.formats.parallels.bundle import BUNDLE_FILE_SUFFIX, DESCRIPTOR_NAME, read_bundle
from tapfs.formats.parallels.extension import Extension, read_extension
from tapfs.formats.parallels.header import (
    CLOSED,
    ENTRY_LENGTH,
    EXTENSION_AT,
    LENGTH,
    SECTOR,
    Header,
    parse_header,
)
from tapfs.plan import Plan

_IN_USE_AT = 44
_FLAGS_AT = 52

_HEADER, _EXTENSION, _BITMAP = 1, 2, 3
_NAMES = {_HEADER: "the header or the table", _EXTENSION: "the format extension", _BITMAP: "a dirty bitmap"}


class ParallelsDriver(BlockReader):
    """An open image, read-only: a :class:`tapfs.driver.Driver`."""

    format_name = "parallels"

    def __init__(self, file: HostFile, request: OpenRequest) -> None:
        self.header = header = parse_header(file.read(0, LENGTH), file)
        super().__init__(file, request, _layout(header), _parent(file, request))

    @property
    def plain_details(self) -> frozenset[str]:
        """What an operator may have chosen."""
        return frozenset({"cluster_size"})

    def details(self) -> Mapping[str, object]:
        """The fields of the header."""
        header = self.header
        extension = read_extension(self.file, header)
        return {
            "cluster_size": header.cluster_bytes,
            "kind": header.magic.decode("ascii"),
            "data_offset": header.data_offset,
            "table_entries": header.entries,
            "closed": not header.open,
            "bitmaps": 0 if extension is None else extension.bitmaps,
        }

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """Compare the table with itself and with the file. Never raises for what it finds."""
        header, report = self.header, CheckReport()
        extension = read_extension(self.file, header)
        check = BlockCheck(self, _metadata(header, extension), _NAMES, report, progress, entries=header.entries)
        if header.in_use not in {0, CLOSED}:
            what = "was not closed by who wrote it" if header.open else f"has the unknown state {header.in_use:#x}"
            report.add(Severity.NOTE, f"the image {what}", _IN_USE_AT)
        if header.empty and check.used:
            report.add(Severity.NOTE, "the image says that it is empty, and it has data", _FLAGS_AT)
        if extension is not None and extension.fault is not None:
            report.add(Severity.CORRUPTION, extension.fault, EXTENSION_AT)
        return report

    def repair(self) -> Sequence[Plan]:
        """Nothing: Parallels images are only read."""
        return ()


def _parent(file: HostFile, request: OpenRequest) -> BackingReference | None:
    """What the bundle that the file is part of says: the image itself does not name its parent.

    Who may not look at the descriptor cannot know whether there is a parent. So the descriptor stands for it, and is
    refused as any other parent is.
    """
    if not file.path.endswith(BUNDLE_FILE_SUFFIX):
        return None
    try:
        descriptor = request.further.open(DESCRIPTOR_NAME, Role.DESCRIPTION)
    except ImageError as error:
        if error.kind is ErrorKind.NOT_FOUND:
            return None
        if error.kind is ErrorKind.DENIED:
            return BackingReference(DESCRIPTOR_NAME, ParallelsDriver.format_name)
        raise
    return read_bundle(descriptor.file).below(file.path)


def _metadata(header: Header, extension: Extension | None) -> Iterator[Claim]:
    yield Claim(0, min(header.table_end, header.data_offset), _HEADER)
    if extension is not None and extension.present:
        yield Claim(header.extension_offset, header.cluster_bytes, _EXTENSION)
        for offset in extension.clusters:
            yield Claim(offset, header.cluster_bytes, _BITMAP)


def _layout(header: Header) -> BlockLayout:
    return BlockLayout(
        virtual_size=header.size,
        block_bytes=header.cluster_bytes,
        table_offset=LENGTH,
        entry_bytes=ENTRY_LENGTH,
        order="little",
        slot_bytes=header.cluster_bytes,
        scale=SECTOR if header.old else header.cluster_bytes,
        free=0,
        least_place=header.data_offset,
    )
