"""Faults put into tapfs on purpose, to see that the runs notice them: `python -m tests.faults --break NAME`.

They are in Python, so that no engine has to be built. HACKING.md says to break the C code by hand after a change here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tapfs.kernel.engine import EngineDisk


def _commit_what_failed() -> None:
    """A reservation whose data could not be written is committed."""
    from tapfs.disk.write_path import WritePath

    right = WritePath._settle
    WritePath._settle = lambda path, reservation, *, written: right(path, reservation, written=True)  # type: ignore[method-assign]  # noqa: ARG005


def _forget_a_failed_plan() -> None:
    """What a plan should have made durable is taken for durable although it failed."""
    right = EngineDisk.execute

    def execute(engine: EngineDisk, plan: Any) -> None:
        try:
            right(engine, plan)
        except OSError:
            return

    EngineDisk.execute = execute  # type: ignore[method-assign]


def _two_fill_one_granule() -> None:
    """A writer does not wait for another that fills the same granule."""
    from tapfs.disk.write_claims import Claims

    Claims.wait_until_free = lambda _claims, _ranges: False  # type: ignore[method-assign]


def _believe_the_header() -> None:
    """A driver raises what is no ImageError for a header that it does not expect."""
    import tapfs

    right = tapfs.check

    def check(*arguments: Any) -> Any:
        try:
            return right(*arguments)
        except tapfs.ImageError as error:
            raise KeyError(error.message) from error

    tapfs.check = check  # type: ignore[assignment]


BREAKS: dict[str, Callable[[], None]] = {
    "commit-what-failed": _commit_what_failed,
    "forget-a-failed-plan": _forget_a_failed_plan,
    "two-fill-one-granule": _two_fill_one_granule,
    "believe-the-header": _believe_the_header,
}
