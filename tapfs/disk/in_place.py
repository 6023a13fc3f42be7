"""Holes in the host file in the place of data that is mapped in place: the driver and its map take no part in it."""

from __future__ import annotations

from tapfs.disk.engine_chain import EngineChain
from tapfs.disk.write_claims import Claim, Claims
from tapfs.driver import Placement
from tapfs.extent import Kind, Range, clip


def zero_in_place(chain: EngineChain, claims: Claims, wanted: Range, *, discard: bool) -> None:
    """Zero what of a range of the disk the top layer maps in place, as a guest's write of zeros would.

    Where the host can, zeros are holes in its file; with `discard` nothing is done where it cannot. What is not in
    place stays as it is, and so does all of a layer with a cipher, whose zeros are no zeros on the host. It need not
    be aligned, so it gives the host parts of a granule, too. Writing has begun (`Begun`).
    """
    if chain.top.driver.geometry.cipher is not None:
        return
    claim = Claim()
    try:
        with chain.map_lock:
            # Nobody may unlink a place, and another range get it, before it is zeroed.
            claims.wait_until_free([wanted])
            claim.ranges = [wanted]
            claims.hold(claim)
            found = list(clip(chain.top.driver.map(*wanted), *wanted))
        placements = [
            Placement(each.offset, each.length, each.host_offset, each.file, in_place=True)
            for each in found
            if each.kind == Kind.DATA and each.in_place
        ]
        chain.engine.zero_placements(placements, discard=discard)
    finally:
        with chain.map_lock:
            claims.let_go(claim)
