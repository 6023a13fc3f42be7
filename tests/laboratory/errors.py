"""The error of a laboratory that cannot be built or run."""


class LabError(Exception):
    """One line for the one who ran `make test-xen`."""
