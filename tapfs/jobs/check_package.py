"""Check a package: each of its disks, the digests of its manifest, and the checksums of a disk in chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from tapfs.disk.package import OpenPackage, package_of
from tapfs.errors import ErrorKind, ImageError
from tapfs.findings import CheckReport, Severity
from tapfs.jobs.check import check_image
from tapfs.packages.contents import MOST_DESCRIPTOR_BYTES, Chunks, Digest, PackagedDisk
from tapfs.packages.ovf import read_manifest
from tapfs.packages.xva import checksum_of
from tapfs.records import replace

if TYPE_CHECKING:
    from tapfs.disk.open_options import OpenOptions
    from tapfs.driver import ProgressCallback
    from tapfs.host.file import LocalFile

_PIECE_BYTES = 1 << 20
_XXHASH = "xxh64"


class _Hash(Protocol):
    def update(self, data: bytes, /) -> None: ...

    def hexdigest(self) -> str: ...


def check_package(path: str, options: OpenOptions, *, progress: ProgressCallback | None = None) -> CheckReport | None:
    """Check the package `path`, or of it the disk that the options choose; None if it is no package.

    Raises ImageError for what cannot be read at all.
    """
    with package_of(path, options) as opened:
        if opened is None:
            return None
        report = CheckReport()
        unchecked: list[str] = []
        done = _Progress(progress)
        disks = [disk for disk in opened.package.disks if options.disk in {None, disk.number}]
        for disk in disks:
            reason = _check_disk(report, opened, disk, options, done)
            if reason is not None:
                unchecked.append(f"disk {disk.number} ({disk.name}): {reason}")
        compared = options.disk is None and _check_manifests(report, unchecked, opened, options, done)
        if len(unchecked) >= len(disks) and not compared and not report.findings:
            report.unchecked = "; ".join(unchecked) or "it lists no disk"
            return report
        for each in (*unchecked, *opened.package.notes):
            report.add(Severity.NOTE, each)
        return report


class _Progress:
    """Bytes that were hashed; how many there will be grows with what is found."""

    def __init__(self, progress: ProgressCallback | None) -> None:
        self._progress = progress
        self._done = self._all = 0

    def expect(self, count: int) -> None:
        self._all += count

    def hashed(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._all)


def _check_disk(
    report: CheckReport, opened: OpenPackage, disk: PackagedDisk, options: OpenOptions, done: _Progress
) -> str | None:
    """Add what a check of one disk finds; why it was not checked, if so."""
    if disk.chunks is not None:
        return _check_chunks(report, opened.file, disk, disk.chunks, done)
    try:
        found = check_image(opened.path, replace(options, disk=disk.number))
    except ImageError as error:
        if error.kind not in {ErrorKind.NOT_FOUND, ErrorKind.DENIED, ErrorKind.UNSUPPORTED, ErrorKind.INVALID_FORMAT}:
            raise
        report.add(Severity.CORRUPTION, f"disk {disk.number} ({disk.name}): {error}")
        return None
    for each in found.findings:
        place = "" if each.host_offset is None else f" (at byte {each.host_offset:#x} of it)"
        report.add(each.severity, f"disk {disk.number} ({disk.name}): {each.message}{place}")
    # Those that were counted and not kept.
    report.corruptions += found.corruptions - _count(found, Severity.CORRUPTION)
    report.leaks += found.leaks - _count(found, Severity.LEAK)
    report.leaked_bytes += found.leaked_bytes
    report.allocated_bytes += found.allocated_bytes
    return found.unchecked


def _count(report: CheckReport, severity: Severity) -> int:
    return sum(each.severity is severity for each in report.findings)


def _check_manifests(
    report: CheckReport, unchecked: list[str], opened: OpenPackage, options: OpenOptions, done: _Progress
) -> bool:
    """Compare the files with the digests of the package's manifests; whether anything was compared."""
    compared = False
    for name in opened.package.manifests:
        digests = _digests(report, opened, name, options)
        if digests is None:
            unchecked.append(f"there is no manifest {name}, so no digest was compared")
        for each in digests or ():
            compared = True
            try:
                with closing(opened.open_file(each.file, options)) as file:
                    value = _hashed(hashlib.new(each.algorithm), _pieces(file, done))
            except ImageError as error:
                report.add(Severity.CORRUPTION, f"{name} has a digest of {each.file}: {error}")
                continue
            if value != each.value:
                told = each.algorithm.upper()
                report.add(
                    Severity.CORRUPTION, f"{each.file} does not have the {told} that {name} says: it was changed"
                )
    return compared


def _digests(report: CheckReport, opened: OpenPackage, name: str, options: OpenOptions) -> Sequence[Digest] | None:
    """What a manifest says; None if there is none."""
    try:
        with closing(opened.open_file(name, options)) as file:
            if file.size() > MOST_DESCRIPTOR_BYTES:
                report.add(Severity.CORRUPTION, f"the manifest {name} has {file.size()} bytes")
                return ()
            content = file.read(0, file.size())
    except ImageError as error:
        if error.kind is not ErrorKind.NOT_FOUND:
            raise
        return None
    try:
        return read_manifest(content)
    except ImageError as error:
        report.add(Severity.CORRUPTION, f"the manifest {name}: {error.message}")
        return ()


def _pieces(file: LocalFile, done: _Progress) -> Iterator[bytes]:
    size, at = file.size(), 0
    done.expect(size)
    while at < size:
        piece = file.read(at, min(_PIECE_BYTES, size - at))
        if not piece:
            return
        yield piece
        at += len(piece)
        done.hashed(len(piece))


def _hashed(made: _Hash, pieces: Iterator[bytes]) -> str:
    for piece in pieces:
        made.update(piece)
    return made.hexdigest()


def _check_chunks(
    report: CheckReport, file: LocalFile, disk: PackagedDisk, chunks: Chunks, done: _Progress
) -> str | None:
    """Compare the chunks of a disk with their checksums; why that was not done, if so."""
    report.allocated_bytes += sum(chunks.places.lengths)
    known = {name: places for name, places in chunks.checksums.items() if places.numbers}
    if not known:
        return "its chunks have no checksums"
    done.expect(sum(chunks.places.lengths))
    places = iter(chunks.places)
    number, place = next(places, (-1, None))
    without = 0
    for algorithm, told in known.items():
        make = _hash_named(algorithm)
        if make is None:
            return (
                "its checksums are of xxHash, and the Python package xxhash is not installed: pip install 'tapfs[xva]'"
            )
        for wanted, checksum in told:
            while place is not None and number < wanted:
                without += 1
                number, place = next(places, (-1, None))
            if place is None or number != wanted:
                report.add(
                    Severity.CORRUPTION,
                    f"disk {disk.number} ({disk.name}): chunk {wanted} has a checksum, and is missing",
                )
                continue
            content = file.read(place.offset, place.length)
            made = make()
            made.update(content)
            if made.hexdigest() != checksum_of(file.read, checksum):
                message = f"disk {disk.number} ({disk.name}): chunk {wanted} does not have its checksum: it was changed"
                report.add(Severity.CORRUPTION, message, place.offset)
            done.hashed(len(content))
            number, place = next(places, (-1, None))
    without += (place is not None) + sum(1 for _ in places)
    if without:
        report.add(Severity.NOTE, f"disk {disk.number} ({disk.name}): {without} chunks have no checksum")
    return None


def _hash_named(algorithm: str) -> Callable[[], _Hash] | None:
    if algorithm != _XXHASH:
        return lambda: hashlib.new(algorithm)
    try:
        from xxhash import xxh64
    except ImportError:
        return None
    made: Callable[[], _Hash] = xxh64  # without the library its type is not known
    return made
