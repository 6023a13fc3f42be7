"""Plans: metadata changes as data, in the order in which they must become durable.

A driver never writes. What must reach its host files is a :class:`Plan`: stages of steps.
The engine executes it so:

1. a barrier: everything written before (guest data above all) is durable;
2. the steps of the first stage, in any order, torn or not; a barrier;
3. the same for each further stage.

A first stage that only grows files needs nothing to be durable, so it goes without the barrier
before it; the one after it makes the data durable too.

So a step may rely on every step of the stages before it and on nothing in its own stage.
Because a plan is data, the ordering can be read here and tested by replaying every prefix
and every subset inside a stage.
"""

from __future__ import annotations

from tapfs.records import NamedTuple


class Write(NamedTuple):
    """Bytes at a place in a host file."""

    file: int
    host_offset: int
    data: bytes


class Grow(NamedTuple):
    """Make a host file at least `size` bytes long; what is added reads as zeros."""

    file: int
    size: int


class Discard(NamedTuple):
    """Give the space of a range back to the host file system; the range reads as zeros after.

    Advisory: a host file system that cannot is not an error, so no step may rely on the zeros.
    """

    file: int
    host_offset: int
    length: int


class Allocate(NamedTuple):
    """Take space on the host for a range inside a host file; what it reads as does not change.

    A host file system that cannot is an error (unsupported), as is one without space (no_space).
    """

    file: int
    host_offset: int
    length: int


class Copy(NamedTuple):
    """Copy `length` bytes of a host file from `source` to `host_offset` in the same file.

    The two ranges do not overlap. No other step of the stage writes or cuts off the source.
    """

    file: int
    host_offset: int
    source: int
    length: int


class Shorten(NamedTuple):
    """Make a host file at most `size` bytes long.

    What lay behind is gone. It reads as zeros if the file grows again.
    """

    file: int
    size: int


Step = Write | Grow | Discard | Allocate | Copy | Shorten


class Plan(NamedTuple):
    """Stages of steps with a barrier before the first and after each.

    `mends` names the fault that a plan of a repair mends, for people: "leaked space of 4096 bytes".
    """

    stages: tuple[tuple[Step, ...], ...] = ()
    mends: str = ""

    @property
    def starts_with_barrier(self) -> bool:
        """Whether a barrier comes before the first stage: always, unless that only grows files."""
        return not self.stages or not all(isinstance(step, Grow) for step in self.stages[0])

    def __bool__(self) -> bool:
        return any(self.stages)


def plan(*stages: list[Step] | tuple[Step, ...], mends: str = "") -> Plan:
    """A plan of these stages; empty ones vanish."""
    return Plan(tuple(tuple(stage) for stage in stages if stage), mends)
