"""A sample of the part `decoders` of `make torture`: the kept inputs, and some that differ from them by chance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import decoders

pytestmark = pytest.mark.native

INPUTS = 80


@pytest.mark.parametrize("name", decoders.DECODERS)
def test_a_sample_finds_nothing(name: str, tmp_path: Path) -> None:
    done = decoders.sampled(name, tmp_path, 1, INPUTS)
    assert done.failure is None, done.failure
    assert done.inputs > INPUTS


def test_an_input_for_which_something_does_not_hold_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "wrong.c"
    wrong.write_text(f"""
#include "{decoders.NATIVE}/fuzz.h"
int LLVMFuzzerInitialize(int *count, char ***words) {{ return count == NULL || words == NULL; }}
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {{ HOLD(size < 3 || data[0] != 0xff); return 0; }}
""")
    monkeypatch.setattr(decoders, "sources", lambda _: [wrong])
    done = decoders.sampled("references", tmp_path, 1, 2000)
    assert done.failure is not None
    assert "data[0] != 0xff does not hold" in done.failure


_FUZZER = """#!/bin/sh
for last; do :; done
test -d "$last" || exit {again}
test -e "$last/../met" && echo "Done 7 runs in 1 second(s)" >&2 && exit 0
touch "$last/../met" "$last/timeout-1"
printf '#41\\tNEW cov: 1\\nartifact_prefix=...; Test unit written to %s\\n' "$last/timeout-1" >&2
exit 70
"""


@pytest.mark.parametrize(("again", "inputs"), [(0, 48), (70, 41)])
def test_an_input_that_takes_long_is_done_again_alone(tmp_path: Path, again: int, inputs: int) -> None:
    program, corpus = tmp_path / "references", tmp_path / "corpus"
    program.write_text(_FUZZER.format(again=again))
    program.chmod(0o755)
    corpus.mkdir()
    done = decoders.fuzz(program, corpus, 600, 1)
    assert (done.inputs, done.failure is not None) == (inputs, again != 0)
    assert (corpus / "timeout-1").exists() == (again != 0)
