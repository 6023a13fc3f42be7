"""Damaged qcow2 images, and a comparison of what `tapfs check` and `qemu-img check` say of each of them."""
