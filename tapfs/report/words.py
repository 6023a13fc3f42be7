"""Words of a report: sizes, shares, numbers of things, and the verdict on an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tapfs.report.gathered import Gathered


class Verdict(NamedTuple):
    """A verdict in a few words, and how good it is: good, warn, bad or none."""

    words: str
    tone: str


def human(size: int) -> str:
    """As in "1.5 GiB" and "700 B"."""
    if size < 1024:
        return f"{size} B"
    power = min((size.bit_length() - 1) // 10, 6)
    value = size / (1 << (10 * power))
    text = f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {'BKMGTPE'[power]}iB"


def percent(part: int, whole: int) -> str:
    """The share in percent, with one digit; no share that is not 0 becomes 0."""
    share = part / whole if whole else 0.0
    if share >= 0.9995:
        return f"{share:.0%}".replace("%", " %")
    return "< 0.1 %" if 0 < share < 0.001 else f"{share * 100:.1f} %"


def plural(number: int, thing: str) -> str:
    """As in "1 image" and "2 images"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def verdict(entry: Gathered) -> Verdict:
    """What a check has found."""
    if not entry.infos:
        return Verdict("cannot be opened", "bad")
    report = entry.check
    if report is None:
        return Verdict("not checked", "none")
    if report.unchecked is not None:
        return Verdict("nothing to check", "none")
    if report.corruptions:
        return Verdict(plural(report.corruptions, "error"), "bad")
    if report.leaks:
        return Verdict(f"{plural(report.leaks, 'leak')} of {human(report.leaked_bytes)}", "warn")
    return Verdict("no errors", "good")
