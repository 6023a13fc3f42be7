"""The disagreements of tapfs and QEMU that are known: a predicate in code for each, who is right, and why.

The sheets in docs/specs have a table of those of each format, which `python -m tests.peer.differential.sheets` makes.
"""

from __future__ import annotations

from tests.peer.differential.rules import blocks, others, qcow, qcow2, vmdk
from tests.peer.differential.rules.rule import Rule
from tests.peer.differential.run import Difference

RULES: tuple[Rule, ...] = (*qcow.RULES, *qcow2.RULES, *vmdk.RULES, *blocks.RULES, *others.RULES)


def rule_of(difference: Difference) -> Rule | None:
    """The rule that a difference has, None if nobody knows why the two differ."""
    return next((rule for rule in RULES if rule.fits(difference)), None)
