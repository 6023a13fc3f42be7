"""A scenario is a function of dom0, with a time limit (of an idle machine); it fails by raising."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.xen.scenarios.dom0 import Dom0


@dataclass(frozen=True, slots=True)
class Scenario:
    """`run` returns what to show beside its name, if anything."""

    name: str
    seconds: int
    run: Callable[[Dom0], str | None]


def scenario(seconds: int = 60) -> Callable[[Callable[[Dom0], str | None]], Scenario]:
    """Declare a scenario that may take `seconds` under emulation."""

    def declare(function: Callable[[Dom0], str | None]) -> Scenario:
        return Scenario(function.__name__, seconds, function)

    return declare


def scenarios_of(module: object) -> list[Scenario]:
    """Those that a module declares, in its order."""
    return [value for value in vars(module).values() if isinstance(value, Scenario)]
