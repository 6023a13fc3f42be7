"""Batches: each line is done once, a bad one costs itself only, and a rerun does what is left."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import tapfs as library
from tests.conftest import Ran

MIB = 1 << 20
Tapfs = Callable[..., Ran]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(f"{name}.raw").write_bytes(name.encode() * MIB)
    Path("bad.qcow2").write_bytes(b"QFI\xfb" + bytes(100))
    return tmp_path


def convert(tapfs: Tapfs, text: str, *words: object) -> Ran:
    Path("list").write_text(text)
    return tapfs("convert", "--batch", "list", "--jobs", "1", *words)


def test_lines_have_options_of_their_own_and_common_ones(tapfs: Tapfs, here: Path) -> None:
    lines = [
        "# source target",
        "",
        "a.raw 'a b.qcow2'",
        "b.raw b.vdi -O vdi",
        json.dumps({"source": ["b.raw", "c.raw"], "target": "-c.qcow2", "options": ["-c"]}),
    ]
    ran = convert(tapfs, "\n".join(lines), "-f", "raw", "-O", "qcow2")
    assert (ran.code, ran.out, ran.err) == (0, "3 done\n", "")
    assert library.compare("a b.qcow2", "a.raw", right_format="raw") is None
    assert library.info("b.vdi")["format"] == "vdi"
    assert library.info("./-c.qcow2")["virtual_size"] == 2 * MIB


def test_a_bad_line_fails_alone_and_a_rerun_does_what_is_left(tapfs: Tapfs, here: Path) -> None:
    text = "a.raw a.qcow2 -f raw\nbad.qcow2 bad.raw -f qcow2\nb.raw no/folder/b.qcow2 -f raw\nc.raw c.qcow2 -f raw\n"
    ran = convert(tapfs, text, "-O", "qcow2")
    assert ran.code == 11  # the first that failed
    assert ran.out == "2 done, 2 failed\n"
    assert "list:2: bad.qcow2:" in ran.err
    assert "list:3: no/folder/b.qcow2:" in ran.err
    assert not Path("bad.raw").exists()
    before = Path("c.qcow2").stat().st_ino
    os.mkdir("no")
    os.mkdir("no/folder")
    again = convert(tapfs, text, "-O", "qcow2")
    assert (again.code, again.out) == (11, "1 done, 2 as before, 1 failed\n")
    assert Path("c.qcow2").stat().st_ino == before
    Path("c.raw").write_bytes(b"x" * MIB)
    Path("a.qcow2").unlink()
    assert convert(tapfs, text, "-O", "qcow2").out == "2 done, 1 as before, 1 failed\n"
    assert convert(tapfs, text, "-O", "qcow2", "-o", "cluster_size=4K").out == "3 done, 1 failed\n"


def test_the_last_line_of_a_journal_may_be_cut(tapfs: Tapfs, here: Path) -> None:
    text = "a.raw a.qcow2 -f raw\nb.raw b.qcow2 -f raw\n"
    convert(tapfs, text)
    journal = Path("list.done")
    journal.write_text(journal.read_text()[:-20])
    assert convert(tapfs, text).out == "1 done, 1 as before\n"
    assert convert(tapfs, text).out == "0 done, 2 as before\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a.raw", "line 1: SOURCE and TARGET are needed"),
        ("a.raw x\nb.raw x", "line 2: makes x, as line 1 does"),
        ("a.raw x --nonsense", "line 1: no such option: --nonsense"),
        ("a.raw 'x", "line 1: No closing quotation"),
        ("a.raw -", "line 1: standard input and output"),
        ("{oh}", "line 1:"),
        ('{"source": 1}', "line 1: source and target are names"),
        ('{"source": "a.raw", "goal": "x"}', "line 1: no such key: goal"),
        ("a.raw x --batch y", "line 1: --batch goes with no line"),
    ],
)
def test_a_wrong_list_is_refused_before_anything_is_made(tapfs: Tapfs, here: Path, text: str, said: str) -> None:
    ran = convert(tapfs, text)
    assert ran.code == 64
    assert said in ran.err
    assert not Path("x").exists()


def test_what_is_no_journal_stays_as_it_is(tapfs: Tapfs, here: Path) -> None:
    for name in ("a.raw", "bad.qcow2"):
        content = Path(name).read_bytes()
        ran = convert(tapfs, "b.raw x -f raw", "--journal", name)
        assert ran.code in {10, 11}, ran.err
        assert Path(name).read_bytes() == content


def test_many_checks_have_the_code_of_the_worst(tapfs: Tapfs, here: Path) -> None:
    library.create("good.qcow2", "qcow2", MIB)
    corrupt = Path("corrupt.qcow2")
    library.convert("a.raw", corrupt, format="raw", target_format="qcow2")
    data = bytearray(corrupt.read_bytes())
    data[0x30000:0x30008] = (0x8000_0000_0000_0000 | 1 << 50).to_bytes(8, "big")  # the first L1 entry leads nowhere
    at = int.from_bytes(data[40:48], "big")
    data[at : at + 8] = (1 << 63 | 1 << 50).to_bytes(8, "big")
    corrupt.write_bytes(data)

    def check(*names: str) -> Ran:
        Path("list").write_text("\n".join(names))
        return tapfs("check", "--batch", "list", "--json", "--jobs", "1")

    assert check("good.qcow2", "a.raw").code == 0
    assert check("a.raw").code == 63
    ran = check("good.qcow2", "missing", "corrupt.qcow2")
    assert ran.code == 2
    results = json.loads(ran.out)["results"]
    assert [each["exit_code"] for each in results] == [0, 17, 2]
    assert [each["as_before"] for each in results] == [True, False, False]
    assert results[2]["report"]["corruptions"] >= 1
    assert check("good.qcow2", "missing").code == 17


def test_options_that_do_not_go_together(tapfs: Tapfs, here: Path) -> None:
    Path("list").touch()
    assert tapfs("convert", "--batch", "list", "a.raw", "x").code == 64
    assert tapfs("check", "--batch", "list", "a.raw").code == 64
    assert tapfs("check").code == 64
    assert tapfs("convert", "a.raw", "x", "--json").code == 64
    assert tapfs("convert", "--batch", "no such list").code == 17
    assert tapfs("convert", "--batch", "list").out == "0 done\n"
