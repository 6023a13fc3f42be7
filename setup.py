"""The part of the build that pyproject.toml cannot say: the engine is a cffi module."""

from setuptools import setup

setup(
    cffi_modules=["tapfs/kernel/build_engine.py:ffibuilder"],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
