"""The Xen front end: a supervisor, and one process per disk that serves it to a guest's block frontend."""
