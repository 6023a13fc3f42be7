"""The command line: one module per command, none of which knows a format."""
