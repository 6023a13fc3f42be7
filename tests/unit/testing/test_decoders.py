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
