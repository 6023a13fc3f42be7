"""Run the scenarios that /share/order.json names; one JSON line for each in /share/results."""

from __future__ import annotations

import importlib
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.laboratory.commands import PATIENCE, say
from tests.laboratory.scenario import Host, Scenario, scenarios_of

SHARE = Path("/share")


def run_scenarios(make_host: Callable[[], Host]) -> int:
    """Run one group's scenarios in turn."""
    order = json.loads((SHARE / "order.json").read_text(encoding="utf-8"))
    module = importlib.import_module(f"{order['package']}.{order['group']}")
    chosen = [each for each in scenarios_of(module) if each.name in order["scenarios"]]
    with (SHARE / "results").open("w", encoding="utf-8") as results:

        def tell(**line: object) -> None:
            results.write(json.dumps(line) + "\n")
            results.flush()

        host = make_host()
        host.start()
        for each in chosen:
            say(f"=== {each.name}")
            begin = time.monotonic()
            outcome, detail, usable = _run(each, host)
            tell(name=each.name, outcome=outcome, seconds=time.monotonic() - begin, detail=detail)
            say(f"=== {each.name}: {outcome} {detail}")
            if not usable:
                break
        host.stop()
    return 0


def _run(each: Scenario, host: Host) -> tuple[str, str, bool]:
    """Run one: how it ended, what to show, and whether this machine can go on."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"not done after {each.seconds * PATIENCE} s")

    signal.signal(signal.SIGALRM, expire)
    # Again and again: what cleans up after the first may hang on the same disk.
    signal.setitimer(signal.ITIMER_REAL, each.seconds * PATIENCE, 10)
    try:
        shown = each.run(host) or ""
        left = host.leftovers()
        assert not left, f"left behind: {', '.join(left)}"
    except Exception as error:  # noqa: BLE001 - a scenario may fail by anything
        traceback.print_exc(file=sys.stdout)
        detail = f"{type(error).__name__}: {error}"
        try:
            host.clean()
            usable = not isinstance(error, TimeoutError)
        except Exception:  # noqa: BLE001 - then this machine is of no more use
            traceback.print_exc(file=sys.stdout)
            usable = False
        return "failed", detail, usable
    else:
        return "passed", shown, True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
