"""The I/O kernel of tapfs: the C engine and its Python wrapper. Import as `tapfs.kernel`."""
