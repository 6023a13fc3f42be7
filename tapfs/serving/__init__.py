"""What every process that serves a disk needs, whichever front end it has."""
