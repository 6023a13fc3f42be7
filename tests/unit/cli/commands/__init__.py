"""The commands about images and mounts."""
