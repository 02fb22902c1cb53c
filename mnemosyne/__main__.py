"""``python -m mnemosyne`` is ``mnemosyne``."""

import sys

from mnemosyne.process import ended_at_once


def main() -> int:
    """Run the command that this process was started with; see ``mnemosyne.cli.main``."""
    with ended_at_once():
        from mnemosyne import cli
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
