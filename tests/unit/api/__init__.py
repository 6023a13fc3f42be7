"""Tests of `import tapfs`."""
