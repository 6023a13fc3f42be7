"""Tests of the kit for driver tests."""
