"""Tables of a GPU in docs/performance.md, written from what tools/gpu_suite.py measured.

python tools/gpu_tables.py                                 # print them
python tools/gpu_tables.py --write docs/performance.md     # replace those on the page
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- made by tools/gpu_tables.py -->", "<!-- end -->"
LENGTHS = {8192: "8K", 65536: "64K", 131072: "128K", 524288: "512K", 1048576: "1M", 4194304: "4M"}
ATTENTION = {
    "triton": "ours",
    "sdpa cudnn": "torch SDPA, cuDNN",
    "sdpa flash": "torch SDPA, flash",
    "flex": "FlexAttention, the same pages",
    "varlen": "`torch.nn.attention.varlen`",
}
STEP = {
    "replayed": "replayed (`compile=step`)",
    "compiled": "compiled, launched",
    "eager": "eager",
}


def main() -> None:
    """Print the tables of a result, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "gpu" / "h200.json")
    parser.add_argument("--write", type=Path, help="the page whose tables are replaced")
    options = parser.parse_args()
    tables = tables_of(options.json)
    if options.write is None:
        print(tables)
    else:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(with_tables(page, tables), encoding="utf-8")


def with_tables(page: str, tables: str) -> str:
    """Return a page with what lies between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"a page must hold {BEGIN!r} and then {END!r}; add the two lines")
    return f"{before}{BEGIN}\n{tables}\n{end}{after}"


def tables_of(path: Path) -> str:
    """Return the tables of one result of the suite, as Markdown."""
    result = json.loads(path.read_text(encoding="utf-8"))
    sections = {name: part["result"] for name, part in result["sections"].items()}
    machine, versions = sections["machine"], result["versions"]
    lines = [
        f"Commit {result['commit'][:7]}, {machine['device']['name']}, torch {versions['torch']}, "
        f"triton {versions['triton']}. In the same run a copy",
        f"reached {machine['copy']['GB_s']:,.0f} GB/s, and a matrix product of 8192 cubed "
        f"{machine['matmul']['TFLOP_s']:.0f} TFLOP/s.",
        "",
        *table("decode attention, one row, GB/s", sections["decode"], ATTENTION, "GB_s"),
        "",
        *table("attention of 2,048 rows, TFLOP/s", sections["chunk"], ATTENTION, "TFLOP_s"),
        "",
        *table("decode step of Llama-3-8B's shape, ms", sections["step"], STEP, "seconds"),
    ]
    return "\n".join(lines)


def table(
    title: str, section: dict[str, dict[str, Any]], names: dict[str, str], unit: str
) -> Iterator[str]:
    """Yield the lines of one table: a column per length, a row per name."""
    lengths = sorted({int(key.rpartition(" ")[2]) for key in section})
    yield f"| {title} | " + " | ".join(LENGTHS.get(n, f"{n // 1024}K") for n in lengths) + " |"
    yield "|---" * (len(lengths) + 1) + "|"
    for name, label in names.items():
        cells = [cell(section.get(f"{name} {length}", {}), unit) for length in lengths]
        yield f"| {label} | " + " | ".join(cells) + " |"


def cell(row: dict[str, Any], unit: str) -> str:
    """Return one figure: a rate with its share of the copy or the product, a time alone."""
    if unit not in row:
        return "-"
    value = row[unit] * 1e3 if unit == "seconds" else row[unit]
    share = row.get("percent_of_copy", row.get("percent_of_matmul"))
    return f"{value:,.1f}" if unit == "seconds" else f"{value:,.0f} ({share:.0f}%)"


if __name__ == "__main__":
    main()
