"""`python -m tapfs.cli.asked_by_python COMMAND …`: a command that `import tapfs` has started in a process of its own.

The program writes one message about the end of the command to standard output (`tapfs.serving.messages`), so that the
caller can raise the very error. Mounting needs a process of its own: the process that serves is forked, and a program
with threads must not fork.
"""

from __future__ import annotations

import sys

from tapfs.cli.guard import guarded
from tapfs.cli.main import run_command
from tapfs.cli.parser import UsageError
from tapfs.errors import ImageError
from tapfs.serving.messages import encode, error_to_data


def main() -> int:
    """Run the command and tell how it ended."""

    def body() -> int:
        try:
            run_command(sys.argv[1], sys.argv[2:])
        except ImageError as error:
            answer: dict[str, object] = {"error": error_to_data(error)}
        except UsageError as error:
            answer = {"usage": str(error)}
        else:
            answer = {"done": True}
        sys.stdout.buffer.write(encode(answer))
        return 0

    return guarded("tapfs", body, options_way="python", ends_process=True)


if __name__ == "__main__":
    sys.exit(main())
