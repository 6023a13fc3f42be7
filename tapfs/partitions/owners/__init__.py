"""The files that ranges of a file system belong to, read from damaged file systems too. Pure: bytes in, names out."""
