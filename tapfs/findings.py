"""The findings of a check, each with its severity, and the report that counts and bounds them."""

from __future__ import annotations

from enum import StrEnum

from tapfs.records import NamedTuple, dataclass, field


class Severity(StrEnum):
    """How bad a finding is."""

    CORRUPTION = "corruption"
    LEAK = "leak"
    NOTE = "note"


class Finding(NamedTuple):
    """One thing that check found; `host_offset` is where in the image file, if anywhere."""

    severity: Severity
    message: str
    host_offset: int | None = None


@dataclass(slots=True)
class CheckReport:
    """The result of a check of one image; its parents are not part of it. `findings` is bounded; the counts are not."""

    #: Findings of one severity beyond this many are counted but not kept.
    MAX_KEPT = 100

    findings: list[Finding] = field(default_factory=list[Finding])
    corruptions: int = 0
    leaks: int = 0
    leaked_bytes: int = 0
    allocated_bytes: int = 0
    #: The faults that a repair has mended before this check, in words (`Plan.mends`).
    mended: list[str] = field(default_factory=list[str])
    #: Why nothing was checked; None if the metadata was. The counts say nothing then.
    unchecked: str | None = None
    #: The backing file as the image names it, which was not looked at.
    unchecked_parent: str | None = None

    @property
    def checked(self) -> bool:
        """Whether the image was checked at all."""
        return self.unchecked is None

    def add(self, severity: Severity, message: str, host_offset: int | None = None) -> None:
        """Count a finding and keep it while there is room."""
        if severity is Severity.CORRUPTION:
            self.corruptions += 1
            before = self.corruptions - 1
        elif severity is Severity.LEAK:
            self.leaks += 1
            before = self.leaks - 1
        else:
            before = sum(kept.severity is severity for kept in self.findings)
        if before < self.MAX_KEPT:
            self.findings.append(Finding(severity, message, host_offset))
