"""What a name means on this host, and the host's files: opened, locked, created whole."""
