"""`python -m tapfs.cli` is `tapfs`."""

import sys

from tapfs.cli.main import main

sys.exit(main())
