"""Fuzzing of the drivers by atheris: inputs that reach new code are kept, and lead to further ones."""
