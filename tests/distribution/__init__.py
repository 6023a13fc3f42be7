"""Packages that `make dist` made, installed where nothing else is: `make test-dist`."""
