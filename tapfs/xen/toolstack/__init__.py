"""What the toolstack side runs: attaching disks, the block script of xl, the control client."""
