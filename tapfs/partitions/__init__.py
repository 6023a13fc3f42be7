"""Partition tables and the names of file systems on a virtual disk. Pure: bytes in, facts out."""
