"""Run scenarios in dom0: what its init starts."""

from __future__ import annotations

import sys

from tests.laboratory.scenario_runner import run_scenarios
from tests.xen.scenarios.dom0 import Dom0

if __name__ == "__main__":
    sys.exit(run_scenarios(Dom0))
