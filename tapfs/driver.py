"""The contract of format drivers: the protocols between drivers and everything else.

Drivers map, the engine moves. A driver parses metadata through :class:`HostFile`, answers
`map`, decides in `reserve` where new data will go, and says in a :class:`~tapfs.plan.Plan`
what must reach the disk in which order. It never touches guest data and never writes.

A driver is called by one thread at a time (its layer has a lock, see ARCHITECTURE.md), so it
needs no locking of its own. `formats/README.md` is the guide to writing one.
"""

from __future__ import annotations

from tapfs.ciphers import Argon2, Argon2Cost, Cipher, CipherAlgorithm, CipherMode, Cryptography, InitialVector, wipe
from tapfs.driver_protocols import (
    Begun,
    Checkable,
    Driver,
    Encrypted,
    FramedStreamWriter,
    Identified,
    OnlyStreamed,
    PackedAppending,
    PasswordProving,
    PlainDetails,
    ProgressCallback,
    Recoverable,
    Scratch,
    Snapshotted,
    Sparse,
    Streamable,
    StreamWriter,
    Uncovering,
    WritableDriver,
)
from tapfs.edit_protocols import (
    Amendable,
    Bitmap,
    BitmapKeeper,
    Bitmapped,
    KeySlotted,
    Rebasable,
    Resizable,
    SlotChange,
    SnapshotKeeper,
    SnapshotLister,
    SnapshotRecord,
)
from tapfs.findings import CheckReport, Finding, Severity
from tapfs.format import (
    Ability,
    AmendableFormat,
    CreatableFormat,
    CreateRequest,
    DescribedFormat,
    Format,
    MultiFileFormat,
    OpenRequest,
    SpecialFormat,
    Trailed,
    Trait,
    has_trait,
)
from tapfs.geometry import (
    MAX_DISK_BYTES,
    BackingReference,
    Codec,
    Geometry,
    Identity,
    Packing,
    ParentSearch,
)
from tapfs.host_files import FurtherFiles, HostFile, NoFurtherFiles, NumberedFile, Role
from tapfs.reservation import (
    Operation,
    Placement,
    Reservation,
)

#: The whole contract of a driver but extents and plans, wherever its parts stand.
__all__ = [
    "MAX_DISK_BYTES",
    "Ability",
    "Amendable",
    "AmendableFormat",
    "Argon2",
    "Argon2Cost",
    "BackingReference",
    "Begun",
    "Bitmap",
    "BitmapKeeper",
    "Bitmapped",
    "CheckReport",
    "Checkable",
    "Cipher",
    "CipherAlgorithm",
    "CipherMode",
    "Codec",
    "CreatableFormat",
    "CreateRequest",
    "Cryptography",
    "DescribedFormat",
    "Driver",
    "Encrypted",
    "Finding",
    "Format",
    "FramedStreamWriter",
    "FurtherFiles",
    "Geometry",
    "HostFile",
    "Identified",
    "Identity",
    "InitialVector",
    "KeySlotted",
    "MultiFileFormat",
    "NoFurtherFiles",
    "NumberedFile",
    "OnlyStreamed",
    "OpenRequest",
    "Operation",
    "PackedAppending",
    "Packing",
    "ParentSearch",
    "PasswordProving",
    "Placement",
    "PlainDetails",
    "ProgressCallback",
    "Rebasable",
    "Recoverable",
    "Reservation",
    "Resizable",
    "Role",
    "Scratch",
    "Severity",
    "SlotChange",
    "SnapshotKeeper",
    "SnapshotLister",
    "SnapshotRecord",
    "Snapshotted",
    "Sparse",
    "SpecialFormat",
    "StreamWriter",
    "Streamable",
    "Trailed",
    "Trait",
    "Uncovering",
    "WritableDriver",
    "has_trait",
    "wipe",
]
