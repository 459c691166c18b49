"""Writes README's tables from the committed results; `--check` only tells whether they are up to date.

python -m dlu_triton explain && cp dlu_explain/explain.json bench/results/ && python bench/tables.py
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("results")


def explanations(figures: dict[str, Any]) -> str:
    """The demo of the explanations: what it measured of each method, and where they tie."""
    columns = {
        "hit": "pointing hit",
        "energy": "energy in box",
        "sensitivity": "sensitivity error",
        "conservation": "conservation error",
    }
    lines = [
        "| method | " + " | ".join(columns.values()) + " | ms per image, both digits |",
        "| --- |" + " ---: |" * (len(columns) + 1),
    ]
    for name, values in figures["methods"].items():
        cells = [f"{values[key]:.3f}" if key in values else "" for key in columns]
        milliseconds = values["milliseconds_per_image"]
        cells.append("" if milliseconds is None else f"{milliseconds:.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    (reference,) = (key.removeprefix("against ") for key in figures if key.startswith("against "))
    verdicts = []
    words = {"tie": ("ties", "tie"), "better": ("is better", "are better"), "worse": ("is worse", "are worse")}
    for title, found in zip(columns.values(), figures[f"against {reference}"].values(), strict=True):
        parts = []
        for verdict, (one, several) in words.items():
            names = [name for name, each in found.items() if each == verdict]
            if names:
                parts.append(f"{', '.join(names)} {one if len(names) == 1 else several}")
        verdicts.append(f"- {title}: {'; '.join(parts)}.")
    versions = figures["versions"]
    lines += [
        "",
        f"{figures['images']} test images, two digits each; {figures['device']}, torch {versions['torch']}, Triton "
        f"{versions['triton']}, Python {versions['python']}, commit {figures['commit'][:12]}, "
        "`bench/results/explain.json`.",
        "",
        f"Against {reference}, by a paired bootstrap over the images (95%, each comparison by itself):",
        "",
        *verdicts,
    ]
    return "\n".join(lines)


def updated(readme: str) -> str:
    tables = {"explain": explanations(json.loads(RESULTS.joinpath("explain.json").read_text()))}
    for name, table in tables.items():
        block = f"<!-- {name}: bench/tables.py -->\n\n{table}\n\n<!-- end -->"
        readme, count = re.subn(rf"<!-- {name}: .*?<!-- end -->", lambda _, block=block: block, readme, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"README must have one block {name!r}, got {count}")
    return readme


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is out of date")
    check = parser.parse_args().check
    before = README.read_text()
    after = updated(before)
    if not check:
        README.write_text(after)
    return int(check and before != after)


if __name__ == "__main__":
    sys.exit(main())
