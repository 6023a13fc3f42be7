"""Recovery: replay an image's own journal after a crash, before the image is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tapfs.driver import Driver
from tapfs.host.files import LocalFiles

if TYPE_CHECKING:
    from tapfs.driver import Recoverable

#: A note about an image that is read as if its journal had been replayed.
JOURNAL_WAITS = "its journal waits, because its writer was killed: it is read as if that were replayed"

#: The words for a replay in what a repair mends.
JOURNAL = "its journal, which was not replayed"


def recover(driver: Driver, files: LocalFiles, *, writable: bool) -> bool:
    """Replay the journal of an image that was just opened; whether there was anything, so that it is opened anew.

    For writing the plan is executed and durable. For reading it is laid over the files, which stay as they are.
    Raises ImageError.
    """
    # What is Recoverable has this method; to ask by isinstance takes a tenth of what opening an image does.
    plan = cast("Recoverable", driver).recovery() if hasattr(driver, "recovery") else None
    if not plan:
        return False
    if not writable:
        files.lay_over(plan)
        return True
    from tapfs.kernel.engine import HostDescriptor, execute_on_files  # few images need it

    execute_on_files([HostDescriptor(file.descriptor, file.path, writable=file.writable) for file in files], plan)
    files.replayed = True
    return True
