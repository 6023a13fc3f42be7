"""One known disagreement: the differences that it is about, who is right, and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import StrEnum
from typing import NamedTuple

from tests.peer.differential.run import Difference, Sort


class Right(StrEnum):
    """Who is right, in a word of the sheets."""

    TAPFS = "tapfs"
    QEMU = "QEMU"
    EITHER = "either"


def always(difference: Difference) -> bool:
    """A predicate for rules whose message says everything."""
    del difference
    return True


def zeros(difference: Difference) -> bool:
    """Whether QEMU shows zeros."""
    return not any(difference.theirs)


def of_the_file(difference: Difference) -> bool:
    """Whether QEMU shows zeros, or a sector that stands in a file of the image; a cipher hides where it stands."""
    shown = difference.theirs
    if difference.seed.encrypted or not any(shown):
        return True
    return any(shown[:256] in content or shown[256:] in content for content in difference.files.values())


class Rule(NamedTuple):
    """A disagreement: its formats, the sorts of differences and a pattern in what was said, a predicate, and the words.

    `image` is what is wrong with the image, `tapfs` and `qemu` what each does, `why` the reason why `right` is right.
    """

    formats: tuple[str, ...]
    sorts: tuple[Sort, ...]
    said: str
    image: str
    tapfs: str
    qemu: str
    right: Right
    why: str
    holds: Callable[[Difference], bool] = always

    def fits(self, difference: Difference) -> bool:
        """Whether a difference is this one."""
        return (
            difference.format in self.formats
            and difference.sort in self.sorts
            and re.search(self.said, difference.said, re.DOTALL) is not None
            and self.holds(difference)
        )
