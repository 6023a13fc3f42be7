"""Tests of `tapfs serve --vhost-user` as processes."""
