"""Block devices of Linux: an image as /dev/ublkbN, by the kernel's ublk driver."""
