"""The vhost-user front end: a disk for guests of QEMU, cloud-hypervisor, crosvm and others (docs/front-end.md)."""
