"""The progress of a job whose caller does not want to be told of it."""


def silent(done: int, total: int) -> None:
    """Nobody wants to know: bytes that are done, and of how many, as `tapfs.driver.ProgressCallback`."""
