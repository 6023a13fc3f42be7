"""The format drivers of tapfs. Import as `tapfs.formats`; see README.md to write one."""
