"""A scenario is a function of the machine that it runs on, with a time limit (of an idle one); it fails by raising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar


class Host(Protocol):
    """The machine that scenarios run on."""

    def start(self) -> None:
        """Before the first scenario."""
        ...

    def stop(self) -> None:
        """After the last one."""
        ...

    def leftovers(self) -> list[str]:
        """What a scenario has left behind that it should not."""
        ...

    def clean(self) -> None:
        """After a scenario that failed: begin afresh as far as that is possible."""
        ...


_Host = TypeVar("_Host", bound=Host)


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run` returns what to show beside its name, if anything."""

    name: str
    seconds: int
    run: Callable[[Any], str | None]


def scenario(seconds: int = 60) -> Callable[[Callable[[_Host], str | None]], Scenario]:
    """Declare a scenario that may take `seconds` under emulation."""

    def declare(function: Callable[[_Host], str | None]) -> Scenario:
        return Scenario(function.__name__, seconds, function)

    return declare


def scenarios_of(module: object) -> list[Scenario]:
    """Those that a module declares, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Scenario)]
