"""The toolstack's side: attaching disks, the block script of xl, the control client."""
