"""RAM disks: a raw image in a named piece of shared memory, for all who open that name.

A RAM disk is mapped like a raw image. It differs in its location and its sharing (`tapfs.host.ram`). It stays until it
is removed or the host restarts.
"""

from __future__ import annotations

from tapfs.driver import Trait
from tapfs.formats.raw import IdentityFormat

FORMAT = IdentityFormat("ram", frozenset({Trait.IN_MEMORY}), {})
