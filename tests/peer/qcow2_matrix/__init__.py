"""The matrix of qcow2 images that tapfs and QEMU write in turns: kinds, both writers, a run, and a program."""
