"""Regular expressions that are compiled when they are first used.

To compile one takes up to half a millisecond of a command's start, and most commands use few of those that their
modules name.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, AnyStr

if TYPE_CHECKING:
    from typing import Any, Generic
else:
    Generic = {AnyStr: object}


class _Pattern(Generic[AnyStr]):
    """What is asked of it is the compiled expression's, and kept here, so that it is found at once from then on."""

    def __init__(self, text: AnyStr, flags: int) -> None:
        self._text: AnyStr = text
        self._flags = flags

    def __getattr__(self, name: str) -> Any:
        found = self.__dict__[name] = getattr(re.compile(self._text, self._flags), name)
        return found


def pattern(text: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """As `re.compile`, but a text that is no regular expression is found out at the first use."""
    made: Any = _Pattern(text, flags)
    compiled: re.Pattern[AnyStr] = made
    return compiled
