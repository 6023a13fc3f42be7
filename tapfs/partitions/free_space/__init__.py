"""Free space of file systems, read from their own maps and never guessed. Pure: bytes in, ranges out."""
