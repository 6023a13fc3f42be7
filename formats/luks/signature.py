"""The first bytes of a LUKS container of either version, and of the second header of LUKS2."""

MAGIC = b"LUKS\xba\xbe"
SECOND_MAGIC = b"SKUL\xba\xbe"

VERSION_1, VERSION_2 = 1, 2
