"""The benchmarks: `make bench`. Nothing here is a test; nothing in the tests is timed."""
