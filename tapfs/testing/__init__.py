"""A test kit for format drivers: `python -m tapfs.testing FORMAT`, and the parts of it for tests of one's own.

`model` has MemoryFile, a host file that can be crashed, and ModelDisk, the engine in Python. The suites over them need
nothing but a `Format`: `operations` (random requests against a bytearray), `crash` (the file after a crash at any
moment), `resize` (new sizes, and crashes on the way) and `hostile` (damaged images). formats/README.md is the guide to
writing a driver.
"""
