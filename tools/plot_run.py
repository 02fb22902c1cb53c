"""Draw a run from its step records: chunk size, step time against its target, pages in use.

Usage: python tools/plot_run.py steps.jsonl run.png [target_tbt_in_seconds]
"""

from __future__ import annotations

import sys

from mnemosyne.metrics import read_steps
from mnemosyne.plot import draw_run


def main(arguments: list[str]) -> int:
    if len(arguments) not in (2, 3):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        records = read_steps(arguments[0])
        target_s = float(arguments[2]) if len(arguments) == 3 else None
        draw_run(records, arguments[1], target_s=target_s)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments[1]}: {len(records)} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
