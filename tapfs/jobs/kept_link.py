"""The link of an overlay to its base, kept while the base is written: an overlay may name the base by an identity.

A base of some formats (VMDK, VHDX, VDI) gets another identity when it is written. The order of the writes is:

1. the overlay names both identities of the base, that of now and the next one (`tapfs.driver.Expecting`);
2. the base says that it is written, and has the next identity;
3. the overlay names that one alone.

So the overlay matches its base at every moment. Where it has no room for a second identity it names none until 3: a
crash then leaves an overlay that takes any base of that name.

A base that grows first gets several identities. The overlay names none meanwhile (`unbound`, `bind`).

An overlay that does not match its base before the commit was opened with `any_parent`. There is nothing to keep then:
it names the base afterwards where its format can, and else it stays as it was.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from tapfs.disk.live import once_more
from tapfs.driver import Driver, Expecting, Identified, Rebasable, Renewing
from tapfs.errors import ErrorKind, ImageError
from tapfs.jobs.editing import execute_edit

if TYPE_CHECKING:
    from tapfs.disk.chain import Layer
    from tapfs.disk.image import Image


def is_renamed(child: Driver, base: Driver) -> bool:
    """Whether the child does not match its base any more once that is written."""
    reference = child.geometry.backing
    if reference is None or reference.identity is None or not isinstance(base, Identified):
        return False
    return reference.identity not in (base.next_identities if isinstance(base, Renewing) else base.identities)


def _matches(child: Driver, base: Driver) -> bool:
    """Whether the child names the base by an identity that it has now."""
    reference = child.geometry.backing
    if reference is None or reference.identity is None or not isinstance(base, Identified):
        return False
    return not base.identities.isdisjoint((reference.identity, *reference.other_identities))


def unbound(child: Layer, base: Layer) -> bool:
    """Have the child match its base whatever identity that gets; whether it named one, and is to be bound again."""
    changes = isinstance(base.driver, Renewing) and _matches(child.driver, base.driver)
    if not changes or not isinstance(child.driver, Expecting):
        return False
    execute_edit(child, child.driver.expect(None))
    return True


def bind(child: Layer, base: Layer) -> None:
    """Have the child name the base by the identity that it has now. Raises ImageError."""
    if isinstance(child.driver, Rebasable):
        execute_edit(child, child.driver.rebase(child.driver.geometry.backing, base.driver))


def begin_writing(base: Image, child: Layer) -> bool:
    """Have the base, which is open for writing, say that it is written, and the child name it as it is then.

    Whether anything of the child was changed. What is not `Rebasable` was refused before. Raises ImageError.
    """
    renamed = is_renamed(child.driver, base.layers[0].driver)
    matches = _matches(child.driver, base.layers[0].driver)
    if renamed and matches:
        _expect(base, child)
    return _begin(base, child, renamed=renamed, matches=matches)


def begin_matching(base: Image, child: Layer) -> None:
    """The same, but refused where the child would not match its base for a moment. Its driver stays of use.

    Raises ImageError(unsupported) then.
    """
    renamed = is_renamed(child.driver, base.layers[0].driver)
    matches = _matches(child.driver, base.layers[0].driver)
    if renamed and matches and not _expect(base, child):
        raise ImageError(
            ErrorKind.UNSUPPORTED,
            "names its parent by one identity, which changes with the first write to that",
            path=child.path,
            op="commit",
            remedy="commit it when nobody uses it: tapfs commit FILE",
        )
    _begin(base, child, renamed=renamed, matches=matches)


def _expect(base: Image, child: Layer) -> bool:
    """Have the child name the next identity of the base, too; whether it does."""
    driver = base.layers[0].driver
    if not isinstance(child.driver, Expecting) or not isinstance(driver, Renewing):
        return False
    execute_edit(child, child.driver.expect(driver))
    with closing(once_more(child, writable=False, direct=child.file.direct)) as layer:
        reference = layer.driver.geometry.backing
    if reference is None or reference.identity is None:  # it takes any parent that it names
        return reference is not None
    return not driver.next_identities.isdisjoint((reference.identity, *reference.other_identities))


def _begin(base: Image, child: Layer, *, renamed: bool, matches: bool) -> bool:
    base.write_zeroes(0, 0)  # it says now that it is written, before anything else is
    if not renamed or not isinstance(child.driver, Rebasable):
        return False
    try:
        bind(child, base.layers[0])
    except ImageError as error:
        # The child's format has no name for such a base: it needs `any_parent` as before.
        if matches or error.kind is not ErrorKind.UNSUPPORTED:
            raise
        return False
    return True
