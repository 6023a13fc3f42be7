"""Mutated images of every format that tapfs and QEMU both read: the two agree, or a rule says who is wrong and why."""
