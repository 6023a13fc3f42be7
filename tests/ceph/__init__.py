"""A real Ceph cluster of one node, and images in it: `make test-remote`."""
