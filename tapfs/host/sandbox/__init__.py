"""The sandbox: what a process may still do of its host once it has to do with an image of a stranger.

`confinement` is the door: `enter` before the first byte of an image is looked at, `narrow` when all of its files are
open. `rules` has the files (Landlock), `filter` the system calls (seccomp), `capabilities` what is left of root.
docs/sandbox.md says for users which command may do what.
"""
