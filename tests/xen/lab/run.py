"""`make test-xen`: build the laboratory, boot it once for each group of scenarios, say what became of each scenario.

usage: python -m tests.xen.lab.run [GROUP | GROUP/SCENARIO]...
       python -m tests.xen.lab.run --script FILE [OTHER...]   a shell script in dom0 instead; all are in /share
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.xen.lab.build import CACHE, HERE, Lab, build
from tests.xen.lab.errors import LabError
from tests.xen.lab.machine import Machine
from tests.xen.lab.payload import make_payload
from tests.xen.scenarios.commands import PATIENCE

SCENARIOS = HERE.parent / "scenarios"
AT_ONCE = 2
# Boot and power off. Like the limits of the scenarios, those of an idle machine.
BOOT_SECONDS = 30
SCRIPT_SECONDS = 1200
SHOWN_LINES = 40


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


@dataclass(slots=True)
class Report:
    """What a boot told: a dictionary for each scenario, and what went wrong beside them."""

    group: str
    work: Path
    seconds: float
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    problems: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return not self.problems and all(result["outcome"] == "passed" for result in self.results)

    def show(self) -> None:
        say(f"{self.group} ({self.seconds:.0f} s)")
        for result in self.results:
            detail = str(result["detail"]).replace("\n", "\n      ")
            say(f"  {result['outcome']:7} {result['name']} ({result['seconds']:.1f} s) {detail}".rstrip())
        for problem in self.problems:
            say(f"  failed: {problem}")
        if not self.passed:
            for name in ("serial.log", "share/output", "share/blktapctrl.log", "share/dmesg"):
                _show_tail(self.work / name)
            say(f"--- all of it lies in {self.work}")


def _show_tail(path: Path) -> None:
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        say(f"--- {path.name}, its last lines")
        for line in lines[-SHOWN_LINES:]:
            say(f"  | {line}")


def _groups() -> dict[str, str]:
    """The modules that declare scenarios, with their text."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in sorted(SCENARIOS.glob("*.py"))}
    return {name: text for name, text in texts.items() if "\n@scenario(" in text}


def _seconds(text: str, only: str | None) -> int:
    """How long the scenarios of a module may take together."""
    declared = re.findall(r"^@scenario\((?:seconds=)?(\d+)\)\ndef (\w+)", text, re.MULTILINE)
    return sum(int(seconds) for seconds, name in declared if only in {None, name})


def _folder(name: str) -> Path:
    work = CACHE / "runs" / name
    shutil.rmtree(work, ignore_errors=True)
    (work / "share").mkdir(parents=True)
    return work


def _run(lab: Lab, payload: Path, group: str, only: str | None, time_limit: float) -> Report:
    work = _folder(group)
    share = work / "share"
    (share / "order.json").write_text(json.dumps({"group": group, "only": only}), encoding="utf-8")
    begin = time.monotonic()
    problem = Machine(lab, payload, share, work / "serial.log").run((BOOT_SECONDS + time_limit) * PATIENCE)
    report = Report(group, work, time.monotonic() - begin)
    results = share / "results"
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    report.results = lines[1:]
    if problem:
        report.problems.append(problem)
    status = (share / "status").read_text().strip() if (share / "status").is_file() else None
    if status is None:
        report.problems.append("dom0 did not come to an end of its scenarios")
    elif status != "0":
        report.problems.append(f"the scenarios ended with status {status}")
    told = {result["name"] for result in report.results}
    report.problems += [f"{name} did not run" for name in (lines[0]["plan"] if lines else []) if name not in told]
    if not report.results:
        report.problems.append("no scenario ran")
    return report


def _run_script(lab: Lab, payload: Path, files: list[Path]) -> int:
    work = _folder("script")
    for number, path in enumerate(files):
        shutil.copy(path, work / "share" / (path.name if number else "script"))
    problem = Machine(lab, payload, work / "share", work / "serial.log").run(SCRIPT_SECONDS)
    output = work / "share/output"
    say(output.read_text(encoding="utf-8", errors="replace") if output.is_file() else "")
    if problem:
        say(f"failed: {problem}; {work / 'serial.log'}")
    return 1 if problem else int((work / "share/status").read_text())


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="GROUP[/SCENARIO]")
    parser.add_argument("--script", nargs="+", type=Path, metavar="FILE", help="run a shell script in dom0 instead")
    arguments = parser.parse_args()
    groups = _groups()
    wanted = [(name, only or None) for name, _, only in (text.partition("/") for text in arguments.scenarios or groups)]
    unknown = [name for name, only in wanted if name not in groups or not _seconds(groups[name], only)]
    if unknown:
        say(f"no such scenario in {', '.join(unknown)}; the groups: {', '.join(groups)}")
        return 64
    begin = time.monotonic()
    try:
        lab = build(say)
        payload = CACHE / "payload.img"
        make_payload(lab, payload)
    except LabError as error:
        say(f"test-xen: {error}")
        return 1
    if arguments.script:
        return _run_script(lab, payload, arguments.script)
    say(f"laboratory ready after {time.monotonic() - begin:.0f} s; {len(wanted)} boots, {AT_ONCE} at once")
    # The long ones first, so that no core idles at the end.
    wanted.sort(key=lambda each: -_seconds(groups[each[0]], each[1]))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        boots = [pool.submit(_run, lab, payload, name, only, _seconds(groups[name], only)) for name, only in wanted]
        reports: list[Report] = []
        for boot in as_completed(boots):
            reports.append(boot.result())
            reports[-1].show()
    results = [result for report in reports for result in report.results]
    passed = sum(result["outcome"] == "passed" for result in results)
    say(f"test-xen: {passed} of {len(results)} scenarios passed in {time.monotonic() - begin:.0f} s")
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
