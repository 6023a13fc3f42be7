"""Run scenarios on a Linux without Xen: what its init starts."""

from __future__ import annotations

import sys

from tests.laboratory.scenario_runner import run_scenarios
from tests.ublk.scenarios.block_devices import BlockDevices

if __name__ == "__main__":
    sys.exit(run_scenarios(BlockDevices))
