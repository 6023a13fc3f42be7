"""The packer of raw deflate with a window of 4 KiB: any bytes come back through zlib with that window, in steps."""

from __future__ import annotations

import random
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tapfs.driver import Codec
from tapfs.kernel.engine import compress
from tests.unit.engine.small_window import unpacked

WINDOW = 4096
BLOCK = 64 << 10


def packed(data: bytes, granule: int) -> list[bytes | None]:
    payloads = compress(Codec.RAW_DEFLATE, data, granule)
    for index, payload in enumerate(payloads):
        if payload is not None:
            assert len(payload) < granule
            assert unpacked(payload, 1000) == data[index * granule :][:granule]
    return payloads


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """Pieces of every kind beside each other, and copies from distances on both sides of the window."""
    choice = random.Random(draw(st.integers(0, 1 << 32)))
    out = bytearray(b"tapfs")
    length = draw(st.sampled_from([WINDOW + 1, 2 * WINDOW, BLOCK - 1, BLOCK, BLOCK + 3, 3 * BLOCK]))
    pieces = draw(st.lists(st.sampled_from(["same", "random", "words", "skewed", "copy"]), min_size=1, max_size=6))
    while len(out) < length:
        kind, size = choice.choice(pieces), choice.choice([1, 3, 4, 5, 257, 258, 259, 1000, 20000])
        if kind == "same":
            out += bytes([choice.randrange(256)]) * size
        elif kind == "random":
            out += choice.randbytes(size)
        elif kind == "words":
            out += b"".join(choice.choices([b"cluster ", b"grain ", b"extent ", b"of ", b"\0\0"], k=size // 6 + 1))
        elif kind == "skewed":
            out += bytes(choice.getrandbits(8) & choice.getrandbits(8) & choice.getrandbits(8) for _ in range(size))
        else:
            back = min(len(out), choice.choice([1, 2, 3, 4, WINDOW - 1, WINDOW, WINDOW + 1, 9 * WINDOW]))
            out += out[len(out) - back :][:size]
    return bytes(out[:length])


@settings(max_examples=60, deadline=None)
@given(contents())
def test_any_bytes_come_back(data: bytes) -> None:
    packed(data, len(data))


SHAPES = {
    "zeros": bytes(BLOCK),
    "one byte among zeros": bytes(40000) + b"x" + bytes(BLOCK - 40001),
    "two bytes in turns": b"ab" * (BLOCK // 2),
    "the greatest distance": random.Random(2).randbytes(WINDOW - 1) * 2,
    "a distance that is too far": random.Random(3).randbytes(WINDOW + 1) * 2,
    "one block that is stored": bytes(BLOCK) + random.Random(4).randbytes(BLOCK) + b"packed " * 5000,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_their_own(shape: str) -> None:
    data = SHAPES[shape]
    payload = packed(data, len(data))[0]
    if shape == "a distance that is too far":
        assert payload is None
    else:
        assert payload is not None


def test_a_granule_packs_alike_whatever_is_packed_beside_it() -> None:
    """A target is the same file however many threads made it, and wherever their windows began."""
    granules = [random.Random(seed).randbytes(300) * 30 for seed in range(4)]
    together = packed(b"".join(granules), 9000)
    assert together == [packed(granule, 9000)[0] for granule in granules]
    assert packed(b"".join(granules[::-1]), 9000) == together[::-1]


def test_what_saves_a_few_bytes_only_is_packed_and_what_saves_none_is_not() -> None:
    noise = random.Random(5).randbytes(BLOCK - 400)
    repeated = noise + noise[-400:]
    assert packed(repeated, BLOCK)[0] is not None
    assert packed(random.Random(6).randbytes(BLOCK), BLOCK) == [None]


def test_text_is_packed_no_larger_than_by_zlib() -> None:
    choice = random.Random(7)
    words = [bytes(choice.choices(b"etaoinshrdlucmfw", k=choice.randint(2, 9))) for _ in range(2000)]
    text = b" ".join(choice.choices(words, k=20000))[:BLOCK]
    payload = packed(text, BLOCK)[0]
    packer = zlib.compressobj(6, zlib.DEFLATED, -12, 9)
    assert payload is not None
    assert len(payload) <= len(packer.compress(text) + packer.flush())
