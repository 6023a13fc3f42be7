"""The footer that counts among those of an image: the last one, or the copy at the start of an image that grows.

A crash while an image grows leaves no footer at the end, and the copy counts then. docs/specs/vhd.md, "Telling fixed
from dynamic", has the order. What is wrong with the others is said in notes; none of it is a reason not to read.
"""

from __future__ import annotations

from tapfs.driver import Finding, HostFile, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.rounding import round_down
from tapfs.formats.vhd.footer import FIXED, LENGTH, POISON, SHORT_LENGTH, SUBFORMATS, TYPE_AT, Footer, parse_footer
from tapfs.records import dataclass, field

_SECTOR = 512


@dataclass(slots=True)
class Footers:
    """The footer of an image, and what became of the others.

    `offset` is where the footer was found, and `source` says that in words. `place`: where the last footer lies, or
    belongs where there is none. `last_good`, `copy_good`: whether the last footer, or the copy at offset 0, has the
    right checksum.
    """

    footer: Footer
    offset: int
    place: int
    source: str
    last_good: bool
    copy_good: bool
    findings: list[Finding] = field(default_factory=list[Finding])

    @property
    def trusted(self) -> bool:
        """Whether the footer that counts has the right checksum."""
        return self.footer.fits


class _Found:
    """A footer at one place of the file, or what is there instead."""

    def __init__(self, file: HostFile, offset: int, length: int, source: str) -> None:
        self.offset = offset
        self.source = source
        raw = file.read(offset, length) if offset >= 0 else b""
        self.poisoned = raw.startswith(POISON)
        self.footer = parse_footer(raw)
        self.good = self.footer is not None and self.footer.fits


def find_footers(file: HostFile) -> Footers:
    """The footers of a file.

    Raises ImageError: invalid_format for a file without any, unsupported for one that its owner has disabled or whose
    type is not known, corrupt where two good footers describe two disks.
    """
    size = file.size()
    copy = _Found(file, 0, LENGTH, "the copy at the start")
    last = _last(file, size)
    if last.poisoned or copy.poisoned:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            'its footer begins with "v_poison": the tool of its owner has disabled it',
            path=file.path,
            offset=last.offset if last.poisoned else 0,
            op="open",
        )
    chosen = _chosen(last, copy)
    if chosen is None or chosen.footer is None:
        raise ImageError(
            ErrorKind.INVALID_FORMAT,
            "not a VHD image: no footer",
            path=file.path,
            op="open",
            remedy="a fixed image that lost it is its disk, perhaps with 512 bytes behind that: say {format=raw}",
        )
    _require_known_type(chosen.footer, chosen.offset, file.path)
    place = last.offset if last.footer is not None else max(0, round_down(size, _SECTOR) - LENGTH)
    found = Footers(chosen.footer, chosen.offset, place, chosen.source, last.good, copy.good)
    if chosen.footer.type == FIXED:
        found.copy_good = True  # there is none to be good
        _require_no_copy(chosen.footer, copy, last.offset, file.path)
    else:
        _compare(found, last, copy, file.path)
    if not found.trusted:
        message = f"the checksum of {chosen.source} is wrong"
        found.findings.append(Finding(Severity.CORRUPTION, message, chosen.offset))
    return found


def _last(file: HostFile, size: int) -> _Found:
    """The footer at the end, which may have 511 bytes."""
    whole = _Found(file, size - LENGTH, LENGTH, "the footer at the end")
    if whole.footer is not None or whole.poisoned:
        return whole
    short = _Found(file, size - SHORT_LENGTH, SHORT_LENGTH, "the footer of 511 bytes at the end")
    return short if short.footer is not None else whole


def _chosen(last: _Found, copy: _Found) -> _Found | None:
    """The one that counts: a good one before others, the last before the copy. A fixed image has no copy."""
    grows = copy.footer is not None and copy.footer.type != FIXED
    candidates = [last, copy] if grows else [last]
    return next((each for each in candidates if each.good), None) or next(
        (each for each in candidates if each.footer is not None), None
    )


def _require_known_type(footer: Footer, offset: int, path: str) -> None:
    if footer.type not in SUBFORMATS:
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            f"the type of the disk is {footer.type}, only 2 (fixed), 3 (dynamic) and 4 (differencing) are known",
            path=path,
            offset=offset + TYPE_AT,
            op="open",
        )


def _require_no_copy(footer: Footer, copy: _Found, offset: int, path: str) -> None:
    """Raise ImageError(corrupt) where a footer of the type fixed has the place of a dynamic header, as the copy has.

    The start of a fixed disk is the guest's, who may write a footer there, but not into the one at the end.
    """
    other = copy.footer
    if copy.good and other is not None and other.type != FIXED and other.data_offset == footer.data_offset:
        message = "the footer at the end says that the disk is fixed, and its copy at the start that it grows"
        raise ImageError(ErrorKind.CORRUPT, message, path=path, offset=offset + TYPE_AT, op="open")


def _compare(found: Footers, last: _Found, copy: _Found, path: str) -> None:
    """Note what differs between the last footer and the copy, of an image that should have both."""

    def note(message: str, offset: int) -> None:
        found.findings.append(Finding(Severity.NOTE, message, offset))

    if last.footer is None:
        note("there is no footer at the end, as after a crash; the copy at the start counts", found.place)
    elif not last.good and copy.good:
        note("the footer at the end has a wrong checksum; the copy at the start counts", last.offset)
    if copy.footer is None:
        note("there is no copy of the footer at the start: QEMU reads nothing but that", 0)
    elif not copy.good and last.good:
        note("the copy of the footer at the start has a wrong checksum: QEMU refuses the image", 0)
    if last.footer is None or copy.footer is None or last.footer == copy.footer:
        return
    if last.good and copy.good and not last.footer.same_disk(copy.footer):
        raise ImageError(
            ErrorKind.CORRUPT,
            "the footer at the end and its copy at the start have good checksums and describe two disks",
            path=path,
            offset=last.offset,
            op="open",
        )
    if last.good and copy.good:
        note("the footer at the end and its copy at the start differ; the one at the end counts", last.offset)
