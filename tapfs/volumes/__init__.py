"""Images in a folder as storage volumes of systemd, handed out as descriptors of their disks."""
