"""Faults between the engine and its host, races, and mutated images. `python -m tests.faults` runs the long matrix."""
