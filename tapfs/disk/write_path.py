"""The write path of a disk: bytes go in place or to reserved places, and metadata goes by plans.

The engine writes in place as far as the map allows. For the rest the driver reserves places, the engine writes there
(filling partial granules with the old contents), and the driver commits. Metadata reaches the disk at `flush`, by the
driver's plan.

A write may have many runs. What of them is not in place is reserved, filled and committed together: one call of the
driver, one of the engine, one new map.

Locking. The map lock of the top layer makes a map and its installation one step, and so a commit and its new map. No
thread holds the map lock while the engine moves data or while a driver below maps. Ranges that are being changed are
claimed (`tapfs.disk.write_claims`), all ranges of a write in one step, so that no writer waits while it holds a claim.
`_flush_lock` lets one flush run at a time. It is taken before the map lock, never the other way. kernel/CONCURRENCY.md
has the engine's side.

An exception may come at any call, as KeyboardInterrupt does. So code that claims a range has entered before the
`finally` that gives the range back.

With a plan log (`tapfs.disk.plan_log`) a commit becomes visible only after the log has the plan that makes the commit
durable. A writer that sees the new map writes in place, and its write must not depend on a plan that a kill would take.
A driver knows one plan at a time, so such a commit waits for a flush that is under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, cast

from tapfs.disk.chain_map import STRIDE
from tapfs.disk.engine_chain import EngineChain
from tapfs.disk.in_place import zero_in_place
from tapfs.disk.write_claims import Claim, Claims
from tapfs.driver import (
    Additive,
    Begun,
    Operation,
    PackedAppending,
    PartlyZeroing,
    Placement,
    Reservation,
    Sparse,
    WritableDriver,
)
from tapfs.errors import ErrorKind, ImageError
from tapfs.extent import Kind, Range
from tapfs.kernel import writes
from tapfs.plan import Plan

if TYPE_CHECKING:
    from tapfs.disk.plan_log import PlanLog, PlannedFile
    from tapfs.disk.stream_target import StreamTarget
    from tapfs.kernel.engine import EngineDisk

#: A write that leaves more bytes of metadata unflushed than this is followed by a flush.
_UNFLUSHED_LIMIT = 32 << 20

#: Seconds spent on keeping plans. A flush is due when keeping has cost more than this, and more than a flush costs.
_MIN_KEEP_COST_SECONDS = 0.005

#: A range of an identity is zeroed or discarded in about so many pieces, if it is that long.
_MAX_PIECES = 4096


class WritePath:
    """The writes of one chain whose top layer is writable; ranges lie inside the disk."""

    def __init__(self, chain: EngineChain, plan_log: PlanLog | None = None) -> None:
        self._chain = chain
        self._driver = cast("WritableDriver", chain.top.driver)
        # Without metadata there is nothing to plan.
        self._plan_log = None if chain.top.driver.geometry.identity else plan_log
        self._planned_files: list[PlannedFile] = []
        if plan_log is not None:
            from tapfs.disk.plan_log import PlannedFile

            self._planned_files = [PlannedFile(file.real_path(), file.identity) for file in chain.top.files]
        self._additive = self._driver if isinstance(self._driver, Additive) else None
        #: Whether the log has a plan with all that was committed since the last flush.
        self._kept = False
        #: Seconds that keeping the plan has taken since the last flush, and that the last flush took.
        self._keeping_seconds = self._flush_seconds = 0.0
        self._granule = self._driver.geometry.granule
        #: A part of a packed unit cannot be discarded by itself, and zeroed only where the driver can say it.
        self._zero_granule = self._driver.geometry.packed_unit
        self._partly_zeroing = self._driver if isinstance(self._driver, PartlyZeroing) else None
        #: At most so many bytes are zeroed or discarded by one reservation.
        self._stride = max(self._driver.geometry.map_unit, STRIDE)
        #: Whether `Begun.begin` has been executed, where there is such a thing.
        self._begun = False
        self._flush_lock = threading.Lock()
        self._claims = Claims(chain.map_lock)
        #: The map units ``(first, stop)`` that were committed to since the last flush.
        self._touched: set[tuple[int, int]] = set()

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of the view at `offset`."""
        with writes.window_segments(offset, view, ((0, len(view)),)) as segments:
            self.write_segments(segments)

    def write_segments(self, segments: writes.Segments) -> None:
        """Write all of the segments. After an error any of them may be written, or a part of it."""
        engine = self._begun_engine()
        done = 0
        while done < segments.length:
            commits_seen = self._claims.commits
            gaps = writes.Gaps(segments, self._granule)
            reached = done
            while (outcome := writes.write_in_place(engine, segments, reached, gaps)).incomplete:
                reached = outcome.done
                self._chain.supply_map(outcome)
            # What another writer has meanwhile is looked at again, and what was in place is written once more.
            if not gaps.count or self._write_reserved(segments, gaps, commits_seen):
                done = outcome.done
        self._bound_unflushed()

    def zero(self, offset: int, length: int, *, hide: bool = False) -> None:
        """Make the range read as zeros; with `hide` by what the top layer holds, also where parents have zeros."""
        self._begun_engine()
        for start, stop, whole in self._pieces(offset, offset + length, Operation.ZERO):
            if whole:
                self._change(start, stop - start, Operation.ZERO)
                continue
            for first, last, by_map in self._parts(start, stop):
                seen = memoryview(bytearray(0 if hide else last - first))
                self._chain.read_into(seen, first)
                if hide or any(seen):
                    if by_map:
                        self._change(first, last - first + -last % self._granule, Operation.ZERO)
                    else:
                        self.write(first, memoryview(bytes(last - first)))
        self._bound_unflushed()

    def discard(self, offset: int, length: int) -> None:
        """Free what of the range the format and the host can."""
        self._begun_engine()
        for start, stop, whole in self._pieces(offset, offset + length, Operation.DISCARD):
            if whole:
                self._change(start, stop - start, Operation.DISCARD)
        self._bound_unflushed()

    def zero_in_place(self, wanted: Range, *, discard: bool) -> None:
        """See `tapfs.disk.in_place.zero_in_place`."""
        self._begun_engine()
        zero_in_place(self._chain, self._claims, wanted, discard=discard)

    def uncover(self, offset: int, length: int) -> None:
        """Have the range show the parent again, but for packed units of which it covers a part only."""
        self._begun_engine()
        for start, stop, whole in self._pieces(offset, offset + length, Operation.UNCOVER):
            if whole:
                self._change(start, stop - start, Operation.UNCOVER)
        self._bound_unflushed()

    def flush(self) -> None:
        """Make everything that has returned durable."""
        engine = self._chain.engine
        with self._flush_lock:
            started = time.monotonic()
            with self._chain.map_lock:
                executed = self._driver.flush()
                self._chain.guard_metadata()
                self._keep(executed)
            # The plan may punch what its earlier stages unlink, and `flushed` lets it be used again:
            # by then no request may hold a map in which it still belongs to the disk.
            self._chain.quiesce()
            engine.execute(executed)
            if self._plan_log is not None:
                self._kept = False
                self._plan_log.clear()
            with self._chain.map_lock:
                self._driver.flushed(executed)
                self._chain.guard_metadata()
                self._chain.tables_flushed(self._touched)
                self._touched.clear()
            self._keeping_seconds, self._flush_seconds = 0.0, time.monotonic() - started

    def packed_appender(self) -> StreamTarget:
        """See :meth:`tapfs.disk.image.Image.packed_appender`."""
        from tapfs.disk.stream_target import LockedStream, stream_of

        engine, top = self._begun_engine(), self._chain.top
        if not (isinstance(self._driver, PackedAppending) and self._driver.appends_packed):
            message = f"this {top.driver.format_name} image takes no compressed data beside what it holds"
            remedy = "leave out -c, or make a new image: tapfs convert -c"
            raise ImageError(ErrorKind.UNSUPPORTED, message, path=top.path, op="compress", remedy=remedy)
        return stream_of(engine, self._driver, top.path, lambda writer: LockedStream(writer, self._chain.map_lock))

    def end(self) -> None:
        """Flush, and say in the image that it is not written any more, if it says such a thing.

        Nobody writes meanwhile. A write that comes later begins anew.
        """
        self.flush()
        with self._flush_lock:
            if self._begun and isinstance(self._driver, Begun):
                self._chain.engine.seal(sealed=True)
                self._begun = False
                with self._chain.map_lock:
                    ending = self._driver.end()
                self._execute(ending)

    def _begun_engine(self) -> EngineDisk:
        """The engine, once the image says that it is being written, if it is to say that."""
        engine = self._chain.engine
        if not self._begun:
            with self._flush_lock:
                if not self._begun and isinstance(self._driver, Begun):
                    with self._chain.map_lock:
                        beginning = self._driver.begin()
                    self._execute(beginning)
                    engine.seal(sealed=False)
                self._begun = True
        return engine

    def _execute(self, plan: Plan) -> None:
        if plan:
            self._chain.engine.execute(plan)

    @property
    def unflushed_bytes(self) -> int:
        """Bytes of metadata that only a flush will bring to the disk."""
        return self._driver.unflushed_bytes

    def _write_reserved(self, segments: writes.Segments, gaps: writes.Gaps, commits_seen: int) -> bool:
        """Allocate for the gaps that segments had after `commits_seen` commits, and write them there.

        False, and nothing is written, if another writer had one of them and the map is to be looked at again.
        """
        engine = self._chain.engine

        def fill(placements: Sequence[Placement]) -> None:
            places = writes.Places(placements)
            done = 0
            while (outcome := writes.write_reserved(engine, segments, gaps, places, done)).incomplete:
                done = outcome.done
                self._chain.supply_map(outcome)

        return self._fill(gaps.ranges(), Operation.WRITE, fill, commits_seen)

    def _change(self, offset: int, length: int, operation: Operation) -> None:
        """Zero or discard whole granules."""
        if offset % self._granule:
            raise AssertionError(f"{offset} is inside a granule, whose first bytes would go along")
        engine = self._chain.engine

        def fill(placements: Sequence[Placement]) -> None:
            engine.zero_placements(placements, discard=operation is Operation.DISCARD)

        while not self._fill([Range(offset, length)], operation, fill):
            pass

    def _fill(
        self,
        ranges: Sequence[Range],
        operation: Operation,
        fill: Callable[[Sequence[Placement]], None],
        commits_seen: int | None = None,
    ) -> bool:
        """Reserve places, have the engine fill them, and commit; abort if that fails.

        False, and nothing is done, if another writer had one of the ranges and the map is to be looked at again.
        """
        claim = Claim()
        written = False
        try:
            reservation = self._reserve(claim, ranges, operation, commits_seen)
            if reservation is not None:
                fill(reservation.placements)
                written = True
        except ImageError as error:
            if error.kind is ErrorKind.NO_SPACE and claim.reservation is not None:
                self._release_space(claim.reservation)
            raise
        finally:
            try:
                self._settle(claim, written=written)
            except BaseException:
                self._let_go(claim, written=False)  # what was not done
                raise
        return written

    def _release_space(self, reservation: Reservation) -> None:
        """Give a full host back what a write took that failed: the tables of the writes before it need the space.

        The places are still reserved, and nothing points at them.
        """
        # Fresh places took their space now; others had it before and may have been set aside on purpose.
        taken = [place._replace(fresh=False) for place in reservation.placements if place.fresh and not place.in_place]
        with suppress(ImageError):
            self._chain.engine.zero_placements(taken, discard=True)

    def _reserve(
        self, claim: Claim, ranges: Sequence[Range], operation: Operation, commits_seen: int | None = None
    ) -> Reservation | None:
        """Claim the ranges and have the driver reserve places for them.

        None if the caller must look at the map again: it had to wait for a claim that
        overlapped one of them, or such a one was committed since `commits_seen`.
        """
        with self._chain.map_lock:
            if commits_seen is not None and self._claims.changed_since(commits_seen, ranges):
                return None
            if self._claims.wait_until_free(ranges):
                return None
            claim.reservation = reservation = self._driver.reserve(ranges, operation)
            try:
                self._take_space(reservation)
            except BaseException:
                # Under the same lock: no flush may meet what the host has no space for.
                claim.reservation = None
                self._driver.abort(reservation)
                raise
            claim.ranges = reservation.ranges
            self._claims.hold(claim)
            return reservation

    def _take_space(self, reservation: Reservation) -> None:
        """Take space for the tables that the commit changes. A host that is full fails the write, and no flush."""
        if reservation.metadata:
            self._chain.engine.take_space(reservation.metadata)

    def _settle(self, claim: Claim, *, written: bool) -> None:
        """Commit or abort what was reserved, publish the map that holds then, and let go of the range."""
        with self._flush_lock if self._plan_log is not None else nullcontext():
            self._let_go(claim, written=written)

    def _let_go(self, claim: Claim, *, written: bool) -> None:
        with self._chain.map_lock:
            reservation, claim.reservation = claim.reservation, None
            try:
                if reservation is not None and written:
                    self._commit(reservation)
                elif reservation is not None:
                    self._driver.abort(reservation)
            finally:
                self._claims.let_go(claim)
                if reservation is not None:
                    self._chain.engine.note_written(reservation.ranges)

    def _commit(self, reservation: Reservation) -> None:
        try:
            self._driver.commit(reservation)
            if self._plan_log is not None:
                started = time.monotonic()
                self._keep_commit(self._plan_log)
                self._keeping_seconds += time.monotonic() - started
            self._publish(reservation)
        except BaseException:
            # A part of it may be committed: nobody may go on with the map from before.
            self._forget(reservation)
            raise
        finally:
            self._chain.changed(reservation.ranges)
            unit = self._driver.geometry.map_unit
            self._touched.update(
                (offset // unit, -(-(offset + length) // unit)) for offset, length in reservation.ranges
            )
            # Only now: a writer that has seen this commit counted must not meet the old map.
            self._claims.committed(reservation.ranges)

    def _keep_commit(self, log: PlanLog) -> None:
        """Have what the commit adds to the plan outlive this process, too."""
        whole, self._kept = not self._kept, False
        added = None if whole or self._additive is None else self._additive.added()
        if added is None or not log.add(added):
            self._keep(self._driver.flush())
        self._kept = True

    def _keep(self, plan: Plan) -> None:
        """Have the plan outlive this process until it has been executed."""
        if self._plan_log is not None and plan:
            self._plan_log.keep(plan, self._planned_files)

    def _publish(self, reservation: Reservation) -> None:
        """Have the engine see the map that a commit made, the map lock held."""
        if reservation.exact:
            writes.patch_placed(self._chain.engine, reservation.placements)
        else:
            self._forget(reservation)

    def _forget(self, reservation: Reservation) -> None:
        for offset, length in reservation.ranges:
            self._chain.engine.forget(0, offset, length)

    def _bound_unflushed(self) -> None:
        # A plan takes the longer to keep the more is in it: a flush is due when that has cost as much as a flush does.
        worth_seconds = max(self._flush_seconds, _MIN_KEEP_COST_SECONDS)
        if self.unflushed_bytes > _UNFLUSHED_LIMIT or self._keeping_seconds > worth_seconds:
            self.flush()

    def _pieces(self, offset: int, end: int, operation: Operation) -> Iterator[tuple[int, int, bool]]:
        """Split a range into ``(start, stop, whole)``: partial granules and runs of whole ones.

        Long runs of nothing are left out where the operation has no effect on them.
        """
        identity = self._driver.geometry.identity is not None
        # An identity has one place, however long the range is; others may have many.
        stride = max(self._stride, (end - offset) // _MAX_PIECES) if identity else self._stride
        # Zeros hide what a parent has, and a hole of a host file may be space that was set aside.
        effective = len(self._chain.layers) > 1 if operation is Operation.ZERO else identity
        if effective or not isinstance(self._driver, Sparse):
            yield from self._granules(offset, end, stride)
            return
        while offset < end:
            with self._chain.map_lock:
                nothing = self._driver.empty_run(offset, end)
            stop = min(offset - offset % stride + stride, end)
            hides = nothing is not None and operation is Operation.UNCOVER and nothing.kind is Kind.ZERO
            if nothing is None or hides:
                yield from self._granules(offset, stop, stride)
            offset = stop if nothing is None or hides else nothing.end

    def _parts(self, offset: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Cut a range that has no whole packed unit: parts of granules, and runs of granules that the map can zero."""
        driver = self._partly_zeroing
        if driver is None:
            yield offset, end, False
            return
        for first, stop, whole in self._runs(offset, end, self._granule, self._zero_granule):
            by_map = False
            if whole:
                with self._chain.map_lock:
                    by_map = driver.can_zero(first, stop - first)
            yield first, min(stop, end), by_map

    def _granules(self, offset: int, end: int, stride: int) -> Iterator[tuple[int, int, bool]]:
        """Split a range into partial granules and runs of whole ones, cut at multiples of `stride`."""
        return self._runs(offset, end, self._zero_granule, stride)

    def _runs(self, offset: int, end: int, granule: int, stride: int) -> Iterator[tuple[int, int, bool]]:
        """The same for any granule. A last one that the end of the disk cuts counts as whole, and goes past it."""
        first = offset + -offset % granule
        last = end + -end % granule if end == self._chain.size else end - end % granule
        if first >= last:
            yield offset, end, False
            return
        if offset < first:
            yield offset, first, False
        while first < last:
            stop = min(first - first % stride + stride, last)
            yield first, stop, True
            first = stop
        if last < end:
            yield last, end, False
