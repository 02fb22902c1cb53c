"""``python -m mnemosyne`` is ``mnemosyne``."""

import sys

from mnemosyne.process import end_quietly, ended_at_once


def main() -> int:
    """Run the command that this process was started with; see ``mnemosyne.cli.main``."""
    with ended_at_once():
        from mnemosyne import cli
    status = cli.main()
    end_quietly(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
