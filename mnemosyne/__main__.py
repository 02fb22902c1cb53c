"""``python -m mnemosyne`` is ``mnemosyne``."""

import sys

from mnemosyne.cli import main

if __name__ == "__main__":
    sys.exit(main())
