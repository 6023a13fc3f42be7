"""`python -m tapfs.cli` is `tapfs`."""

import sys

from tapfs.cli.entry import tapfs

sys.exit(tapfs())
