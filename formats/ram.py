"""RAM disks: a raw image in a named piece of shared memory, for all who open that name.

What is special about one is where it lives and how it is shared (`tapfs.host.ram`); mapped
it is like a raw image. It lasts until it is removed or the host restarts.
"""

from __future__ import annotations

from tapfs.driver import Trait
from tapfs.formats.raw import IdentityFormat

FORMAT = IdentityFormat("ram", frozenset({Trait.IN_MEMORY}), {})
