"""Fixed VHDs: the disk as it stands, and a footer behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tapfs.driver import CheckReport, Finding, HostFile, OpenRequest, ProgressCallback, Severity
from tapfs.errors import ErrorKind, ImageError
from tapfs.formats.raw import IdentityDriver
from tapfs.formats.vhd.description import PLAIN, footer_details, notes_of, with_notes
from tapfs.formats.vhd.disk_size import disk_size
from tapfs.formats.vhd.footer import CURRENT_SIZE_AT
from tapfs.formats.vhd.footers import Footers
from tapfs.formats.vhd.identity import identities, link_uuid
from tapfs.formats.vhd.repair import footer_plans
from tapfs.identifiers import Uuid
from tapfs.plan import Plan


class FixedDriver(IdentityDriver):
    """An open fixed image, which is written in place: no metadata changes."""

    def __init__(self, file: HostFile, request: OpenRequest, footers: Footers) -> None:
        size = disk_size(footers.footer)
        self.footers = footers
        #: Damage that the opening has met.
        self.findings: list[Finding] = list(footers.findings)
        if size > footers.place:
            message = f"the disk has {size} bytes, and only {footers.place} stand before the footer"
            if not request.lenient:
                raise ImageError(
                    ErrorKind.CORRUPT, message, path=file.path, offset=footers.offset + CURRENT_SIZE_AT, op="open"
                )
            self.findings.append(Finding(Severity.CORRUPTION, message, footers.offset + CURRENT_SIZE_AT))
            size = footers.place
        super().__init__(file, "vhd", size=size)

    @property
    def identities(self) -> frozenset[str]:
        """The UUID that a differencing image over this one names."""
        return identities(self.footers.footer)

    @property
    def link_uuid(self) -> Uuid | None:
        """The UUID by which a child in one of VirtualBox's formats names this image."""
        return link_uuid(self.footers.footer)

    @property
    def plain_details(self) -> frozenset[str]:
        """What is shown without -v."""
        return PLAIN

    def details(self) -> Mapping[str, object]:
        """What the footer says."""
        return with_notes(footer_details(self.footers), notes_of(self.footers.footer, self.findings))

    def check(self, progress: ProgressCallback | None = None) -> CheckReport:
        """The findings of the opening: a fixed image has no other metadata than its footer."""
        report = CheckReport(allocated_bytes=self.geometry.virtual_size)
        for finding in self.findings:
            report.add(*finding)
        if progress is not None:
            progress(self.geometry.virtual_size, self.geometry.virtual_size)
        return report

    def repair(self) -> Sequence[Plan]:
        """A footer with the right checksum, where only that is wrong."""
        return footer_plans(self.footers)
