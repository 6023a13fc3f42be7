"""`mount --files`: the file system inside an image, mounted over the image's own mount."""
