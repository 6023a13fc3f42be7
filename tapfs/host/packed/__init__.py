"""Files that are packed as a whole: gzip, bzip2, xz and Zstandard in front of an image."""
