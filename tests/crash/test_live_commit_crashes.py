"""Power fails while an overlay is committed that a guest writes: nothing that was flushed is lost or spoilt."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.crash.live_chains import CHAINS, live_commit_crashes


@pytest.mark.parametrize("kind", CHAINS)
def test_a_crash_in_a_live_commit_loses_nothing(tmp_path: Path, kind: str) -> None:
    assert live_commit_crashes(tmp_path, kind, kind)
