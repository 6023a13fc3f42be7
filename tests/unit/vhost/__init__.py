"""Tests of the vhost-user front end in this process."""
