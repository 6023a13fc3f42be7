"""`make test-xen`: build the laboratory, boot it once for each group of scenarios, say what became of each scenario.

The groups are the modules of tests/xen/scenarios, in dom0 of Xen, and of tests/ublk/scenarios, on a newer Linux.

usage: python -m tests.laboratory.run [--xenstored NAME] [GROUP | GROUP/SCENARIO]...
       python -m tests.laboratory.run --script FILE [OTHER...]   a shell script in dom0 instead; all are in /share
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

from tests.laboratory.build import CACHE, TREE, Lab, build
from tests.laboratory.commands import PATIENCE
from tests.laboratory.errors import LabError
from tests.laboratory.machine import Machine
from tests.laboratory.payload import make_payload

XEN, HOST = "tests.xen.scenarios", "tests.ublk.scenarios"
#: Groups of scenarios, by the package that they are in. Those of HOST run without Xen, on a newer kernel.
PACKAGES = (XEN, HOST)
#: Groups of HOST that need the newest kernel of Debian's backports.
NEWEST = {"ublk_newest", "ublk_newest_time"}
AT_ONCE = 2
#: Xen's two stores. Debian starts the first of them; these groups have the other.
OF_OCAML, OF_C = "oxenstored", "xenstored"
WITH_STORE_OF_C = {"attach", "boot_loaders", "driver_domain", "hostile"}
#: The ways to it: its socket, which programs take where there is one, and the kernel's device, for these groups.
SOCKET, DEVICE = "/run/xenstored/socket", "/dev/xen/xenbus"
BY_DEVICE = {"kill", "hvm"}
#: Groups whose dom0 has two processors, and so offers two rings a disk.
WITH_TWO_PROCESSORS = {"guests"}
#: Groups whose machine has a clock that goes by the instructions that it executes.
BY_INSTRUCTIONS = {"counted_instructions"}
# A measurement proves nothing: they run when they are asked for.
ONLY_BY_NAME = {"processor_time", "counted_calls", "counted_instructions", "ublk_time", "ublk_newest_time"}
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
    processor_seconds: float
    results: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    problems: list[str] = field(default_factory=list[str])

    @property
    def passed(self) -> bool:
        return not self.problems and all(result["outcome"] == "passed" for result in self.results)

    def show(self) -> None:
        say(f"{self.group} ({self.seconds:.0f} s, {self.processor_seconds:.0f} s of a processor)")
        for result in self.results:
            detail = str(result["detail"]).replace("\n", "\n      ")
            say(f"  {result['outcome']:7} {result['name']} ({result['seconds']:.1f} s) {detail}".rstrip())
        for problem in self.problems:
            say(f"  failed: {problem}")
        if not self.passed:
            for name in ("serial.log", "share/output", "share/blktapctrl.log", "share/tapfs.log", "share/dmesg"):
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
    return {name: path.read_text(encoding="utf-8") for name, path in _modules().items()}


def _modules() -> dict[str, Path]:
    found = {path.stem: path for package in PACKAGES for path in sorted(_folder_of(package).glob("*.py"))}
    return {name: path for name, path in found.items() if "\n@scenario(" in path.read_text(encoding="utf-8")}


def _folder_of(package: str) -> Path:
    return TREE / package.replace(".", "/")


def _seconds(text: str) -> dict[str, int]:
    """How long each scenario of a module may take."""
    declared = re.findall(r"^@scenario\((?:seconds=)?(\d+)\)\ndef (\w+)", text, re.MULTILINE)
    return {name: int(seconds) for seconds, name in declared}


def _chosen(words: list[str]) -> dict[str, dict[str, int]]:
    """The scenarios of each group that is to be booted, with their seconds. LabError if there is no such scenario."""
    groups = {name: _seconds(text) for name, text in _groups().items()}
    chosen: dict[str, dict[str, int]] = {}
    for word in words or groups.keys() - ONLY_BY_NAME:
        group, _, only = word.partition("/")
        names = [only] if only else list(groups.get(group, ()))
        if not names or group not in groups or only not in {"", *groups[group]}:
            raise LabError(f"there is no scenario {word}; the groups: {', '.join(groups)}")
        chosen.setdefault(group, {}).update({name: groups[group][name] for name in names})
    # The long ones first, so that no core idles at the end.
    return dict(sorted(chosen.items(), key=lambda each: -sum(each[1].values())))


def _folder(name: str) -> Path:
    work = CACHE / "runs" / name
    shutil.rmtree(work, ignore_errors=True)
    (work / "share").mkdir(parents=True)
    return work


def _run(lab: Lab, payload: Path, group: str, scenarios: dict[str, int], xenstored: str | None) -> Report:
    work = _folder(group)
    share = work / "share"
    (share / "xenstore").write_text(DEVICE if group in BY_DEVICE else SOCKET, encoding="ascii")
    (share / "xenstored").write_text(xenstored or (OF_C if group in WITH_STORE_OF_C else OF_OCAML), encoding="ascii")
    package = ".".join(_modules()[group].relative_to(TREE).parts[:-1])
    order = {"package": package, "group": group, "scenarios": list(scenarios)}
    (share / "order.json").write_text(json.dumps(order), encoding="utf-8")
    begin = time.monotonic()
    kernel = None if package == XEN else "newest" if group in NEWEST else "newer"
    processors = 2 if group in WITH_TWO_PROCESSORS else 1
    machine = Machine(
        lab, payload, share, work / "serial.log", kernel, processors, by_instructions=group in BY_INSTRUCTIONS
    )
    ran = machine.run((BOOT_SECONDS + sum(scenarios.values())) * PATIENCE)
    report = Report(group, work, time.monotonic() - begin, ran.processor_seconds)
    results = share / "results"
    if results.is_file():
        report.results = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    if ran.problem:
        report.problems.append(ran.problem)
    status = (share / "status").read_text().strip() if (share / "status").is_file() else None
    if status is None:
        report.problems.append("the machine did not come to an end of its scenarios")
    elif status != "0":
        report.problems.append(f"the scenarios ended with status {status}")
    told = {result["name"] for result in report.results}
    report.problems += [f"{name} did not run" for name in scenarios if name not in told]
    return report


def _run_script(lab: Lab, payload: Path, files: list[Path], xenstored: str | None) -> int:
    work = _folder("script")
    (work / "share/xenstored").write_text(xenstored or OF_OCAML, encoding="ascii")
    (work / "share/xenstore").write_text(SOCKET, encoding="ascii")
    for number, path in enumerate(files):
        shutil.copy(path, work / "share" / (path.name if number else "script"))
    problem = Machine(lab, payload, work / "share", work / "serial.log").run(SCRIPT_SECONDS).problem
    output = work / "share/output"
    say(output.read_text(encoding="utf-8", errors="replace") if output.is_file() else "")
    if problem:
        say(f"failed: {problem}; {work / 'serial.log'}")
    return 1 if problem else int((work / "share/status").read_text())


def main() -> int:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="GROUP[/SCENARIO]")
    parser.add_argument("--xenstored", choices=(OF_OCAML, OF_C), help="Xen's store, for all groups")
    parser.add_argument("--script", nargs="+", type=Path, metavar="FILE", help="run a shell script in dom0 instead")
    arguments = parser.parse_args()
    begin = time.monotonic()
    try:
        chosen = _chosen(arguments.scenarios)
        lab = build(say)
        payload = CACHE / "payload.img"
        make_payload(lab, payload)
    except LabError as error:
        say(f"test-xen: {error}")
        return 1
    if arguments.script:
        return _run_script(lab, payload, arguments.script, arguments.xenstored)
    say(f"laboratory ready after {time.monotonic() - begin:.0f} s; {len(chosen)} boots, {AT_ONCE} at once")
    with ThreadPoolExecutor(AT_ONCE) as pool:
        boots = [
            pool.submit(_run, lab, payload, group, scenarios, arguments.xenstored)
            for group, scenarios in chosen.items()
        ]
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
