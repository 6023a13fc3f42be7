"""The two Varlink interfaces that a storage provider has, as clients may ask for them.

The types are those of systemd 262 (docs/storage-provider.md).
"""

from __future__ import annotations

SERVICE = "org.varlink.service"
PROVIDER = "io.systemd.StorageProvider"

DESCRIPTIONS: dict[str, str] = {
    SERVICE: f"""\
interface {SERVICE}

method GetInfo() -> (vendor: string, product: string, version: string, url: string, interfaces: []string)
method GetInterfaceDescription(interface: string) -> (description: string)

error InterfaceNotFound (interface: string)
error MethodNotFound (method: string)
error MethodNotImplemented (method: string)
error InvalidParameter (parameter: string)
error PermissionDenied ()
error ExpectedMore ()
""",
    PROVIDER: f"""\
# Disk images of a folder, each the regular file that its disk is.
interface {PROVIDER}

type VolumeType (blk, reg, dir)
type CreateMode (any, new, open)

method Acquire(
  name: string,
  createMode: ?CreateMode,
  template: ?string,
  readOnly: ?bool,
  requestAs: ?VolumeType,
  createSizeBytes: ?int,
  allowInteractiveAuthentication: ?bool
) -> (fileDescriptorIndex: int, type: VolumeType, readOnly: bool, baseUID: ?int, baseGID: ?int)

method ListVolumes(matchName: ?string) -> (
  name: string,
  aliases: ?[]string,
  type: VolumeType,
  readOnly: ?bool,
  sizeBytes: ?int,
  usedBytes: ?int
)

method ListTemplates(matchName: ?string) -> (name: string, type: VolumeType)

error NoSuchVolume ()
error VolumeExists ()
error NoSuchTemplate ()
error TypeNotSupported ()
error WrongType ()
error CreateNotSupported ()
error CreateSizeRequired ()
error ReadOnlyVolume ()
error BadTemplate ()
""",
}
