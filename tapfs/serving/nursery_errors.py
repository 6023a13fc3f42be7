"""The one error of a trio nursery. trio wraps even a single error into a group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from tapfs.errors import ImageError


def error_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error in a group, or the first of several that are all to be told to the operator; else the group."""
    errors = list(_leaves(group))
    one = len(errors) == 1 or all(isinstance(error, ImageError) for error in errors)
    return errors[0] if one else group


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for member in cast("BaseExceptionGroup[BaseException]", error).exceptions:
        yield from _leaves(member)
