"""The frame of `make torture`: what it counts, writes and tells, and the table that is made of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest

from tests.many_runs import Done, Job, Tally, run_all
from tests.torture import __main__ as torture
from tests.torture import numbers, power_failures, report
from tests.torture.parts import Budget, Part


def done(number: int, folder: Path) -> Done:
    if number == 2:
        raise AssertionError("the third is wrong")
    (folder / "file").write_text("gone afterwards")
    return Done("well", {"points": 10})


def jobs(count: int) -> Iterator[Job]:
    for number in range(count):
        yield Job(str(number), f"again {number}", partial(done, number))


def test_runs_are_counted_and_a_failure_does_not_end_them(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_all(jobs(6), 2) == Tally(6, 1, Counter({"points": 50}))
    assert "FAILED: again 2" in capfd.readouterr().out


def test_no_run_begins_after_the_end_of_the_time() -> None:
    assert run_all(jobs(6), 2, 0.0).runs == 0


def test_no_run_begins_when_enough_is_counted() -> None:
    assert run_all(jobs(100), 1, enough=15).counts["points"] in {20, 30}  # another one has begun, perhaps


def test_power_fails_in_everything_that_is_written() -> None:
    names = [job.name.partition(" ")[0] for job in power_failures.jobs([0])]
    assert set(names) == {"crash", *power_failures.WHATS}
    assert power_failures.main(["--what", "resize", "--kind", "vhd block_size=4096", "--seed", "3"]) == 0


def test_the_numbers_of_a_part_are_kept_when_another_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(failures: int, budget: Budget) -> Tally:
        return Tally(3, failures, Counter({"points": int(budget.seconds)}))

    parts = (Part("one", 30, "does one", partial(run, 0)), Part("other", 10, "does another", partial(run, 2)))
    monkeypatch.setattr(torture, "suite_disk", nullcontext)
    monkeypatch.setattr(torture, "PARTS", parts)
    monkeypatch.setattr(report, "PARTS", parts)
    words = ["--folder", str(tmp_path), "--seconds", "40"]
    assert torture.main([*words, "--only", "one"]) == 0
    assert torture.main(words) == 1
    assert "other: 3 runs, 2 failures, 10 points" in capfd.readouterr().out
    records = numbers.read(tmp_path / "numbers.json")
    assert {name: dict(record.counts) for name, record in records.items()} == {
        "one": {"points": 30},
        "other": {"points": 10},
    }
    page = report.with_table(f"head\n{report.BEGIN}old\n{report.END}foot\n", records)
    assert page.startswith("head\n<!-- table -->\n| part |")
    assert "| `other` | does another | 10 points | 2 |" in page
    assert page.endswith("foot\n")


def test_the_page_has_the_numbers_of_the_repository() -> None:
    page = report.PAGE.read_text(encoding="utf-8")
    assert report.with_table(page, numbers.read(report.KEPT)) == page
