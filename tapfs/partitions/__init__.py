"""What lies on a virtual disk: partition tables and the names of file systems. Pure: bytes in, facts out."""
