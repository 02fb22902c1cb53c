"""Plan before buying: how many GPUs hold a target, and in which layout.

python examples/planning.py [SHAPE] [HARDWARE] [CONTEXT]
"""

import json
import sys
import tempfile
from pathlib import Path

from mnemosyne.cli import main as mnemosyne

COUNTS = (8, 16)


def main(shape: str = "llama3_8b", hardware: str = "h100", context: str = "1M") -> None:
    for gpus in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "layouts.json"
            # the same as `mnemosyne plan model=... gpus=...`, which also prints its table
            status = mnemosyne(
                [
                    *("plan", f"model={shape}", f"hardware={hardware}", f"context={context}"),
                    *(f"gpus={gpus}", "slo.tbt=30ms", "slo.ttft=60s", f"report={report}"),
                ]
            )
            best = json.loads(report.read_text(encoding="utf-8"))["layouts"][0]
        mesh = " ".join(f"{axis}={best['mesh'][axis]}" for axis in ("pp", "kvp", "tp"))
        print(f"{gpus} GPUs: {'hold it' if status == 0 else 'do not hold it'}; nearest: {mesh}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
