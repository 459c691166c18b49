"""The largest errors against float64, for docs/promises.md: those of `python -m dlu_triton verify`.

    python bench/errors.py && python bench/report.py

writes bench/results/errors-gpu.json or, where there is no GPU, errors-interpreted.json.
"""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import machine

from dlu_triton import _verify

RESULTS = Path(__file__).parent / "results"
ZERO = 1e-6  # below it a result is zero but for roundings, as the gradient of offsets that all lead beyond the border


def worst(device: str) -> list[dict[str, str | int | float]]:
    """For each operator, type and result, in units of the largest true value: the largest error of all cases of that
    type alone, that of eager PyTorch, and how near an error comes to its bound."""
    found: dict[tuple[str, str, str], dict[str, int | float]] = {}
    for operator, dtype, case, comparisons in _verify.rows(device):
        mixed = case.gradient_dtype if isinstance(case, _verify.CAMCase) else case.kernel_dtype
        for result, comparison in comparisons.items():
            if not comparison.passed:
                raise SystemExit(f"{operator} {dtype} {case.name}: {result} is past its bound")
            if mixed is not None or comparison.largest < ZERO:
                continue
            row = found.setdefault(
                (operator, str(dtype).removeprefix("torch."), result),
                {"cases": 0, "error": 0.0, "eager": 0.0, "of_bound": 0.0},
            )
            row["cases"] += 1
            row["error"] = max(row["error"], comparison.kernel / comparison.largest)
            row["eager"] = max(row["eager"], comparison.eager / comparison.largest)
            row["of_bound"] = max(row["of_bound"], comparison.kernel / comparison.bound)
    keys = ("operator", "dtype", "result")
    return [dict(zip(keys, key, strict=True)) | row for key, row in found.items()]


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = RESULTS / ("errors-gpu.json" if device == "cuda" else "errors-interpreted.json")
    figures = {"machine": machine.info(), "datetime": datetime.now(UTC).isoformat(), "errors": worst(device)}
    path.write_text(json.dumps(figures, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
