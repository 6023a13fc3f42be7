"""The commands for images and mounts, one module each."""
