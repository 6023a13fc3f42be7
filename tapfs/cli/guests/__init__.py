"""The commands for disks of Xen guests, one module each."""
