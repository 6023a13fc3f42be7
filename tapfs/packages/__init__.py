"""Packages of virtual machines: the disks that a descriptor or an archive lists, from a function that reads."""
