"""The parts that every process which serves a disk needs, whichever front end the process has."""
