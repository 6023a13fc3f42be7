"""The FUSE front end: one process per mount serves one image as a small tree of files."""
