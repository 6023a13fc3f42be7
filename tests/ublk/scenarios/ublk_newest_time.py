"""Processor time of block devices beside the loop device's on the newest kernel of Debian, which need not copy."""

from __future__ import annotations

from tests.laboratory.scenario import scenario
from tests.ublk.scenarios.block_devices import BlockDevices
from tests.ublk.scenarios.cost import cost_beside_loop


@scenario(200)
def beside_loop(host: BlockDevices) -> str:
    return cost_beside_loop(host)
