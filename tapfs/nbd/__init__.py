"""The NBD server: disks for clients that speak the protocol of network block devices."""
