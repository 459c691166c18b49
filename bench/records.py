"""What a run of the benchmarks found: the records of what was timed, and of rivals that cannot run a case."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import measure
import pytest
import torch
from cases import DETERMINISTIC

# Code of others, where anything may go wrong; other rivals are written here, and only PyTorch may refuse to run them.
FOREIGN = ("mmcv", "official", "mmcv-CARAFEPack", "torchcam", "grad-cam")
OURS = (
    "triton", *DETERMINISTIC, "eager", "DLUPack", "DLUPack-joint", "CARAFEPack", "dlu_triton", "dlu_triton-10",
    "dlu_triton-100",
)  # fmt: skip

# What a record has whether or not it was measured.
FIELDS = (
    "ideal_bytes", "gbps", "roofline", "peak_extra_bytes", "allowed_extra_bytes", "launches", "host_us", "host_waits",
    "max_error", "eager_error", "warm_seconds", "replay_seconds",
)  # fmt: skip


class Records:
    """`measured` also holds `case` and the median `seconds`, for the summary."""

    def __init__(self) -> None:
        self.measured: list[dict[str, Any]] = []
        self.unsupported: list[dict[str, Any]] = []
        self._copies: dict[object, float] = {}  # by case: what its copy moves

    def add(self, benchmark: Any, case: object) -> None:
        """Finish the record of a benchmark that was timed."""
        record, seconds = benchmark.extra_info, benchmark.stats["median"]
        record |= {"series": False, **dict.fromkeys(FIELDS), **record}
        if record["ideal_bytes"] is not None:
            record["gbps"] = record["ideal_bytes"] / seconds / 1e9
            if record["op"] == "copy":
                self._copies[case] = record["gbps"]
            if case in self._copies:
                record["roofline"] = record["gbps"] / self._copies[case]
        self.measured.append({**record, "case": case, "seconds": seconds})

    @contextmanager
    def supported(self, subject: dict[str, Any]) -> Iterator[None]:
        """Skip a rival that cannot run a case, and keep the reason; ours fails.

        But for what ours has no deterministic algorithm for: PyTorch has operators say so in an error.
        """
        impl = subject["impl"]
        caught = () if impl in OURS else (Exception,) if impl in FOREIGN else (RuntimeError,)
        reason = None
        try:
            yield
        except caught as error:
            reason = f"{type(error).__name__}: {error}"
        except RuntimeError as error:
            if impl not in DETERMINISTIC or "deterministic implementation" not in str(error):
                raise
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:  # the traceback, which held tensors, is gone by now
            self.refuse(subject, reason)

    def hold(self, subject: dict[str, Any], what: str, error: float, limit: float) -> None:
        """Refuse a library that is wrong, so that it is not timed as if it were right; what is written here fails."""
        if not error <= limit:
            wrong = f"wrong: {what} is off by {error:.2e}, over {limit:.2e}"
            if subject["impl"] in FOREIGN:
                self.refuse(subject, wrong)
            pytest.fail(f"{subject['impl']} is {wrong}")

    def refuse(self, subject: dict[str, Any], reason: str) -> NoReturn:
        reason = " ".join(reason.split())[:1000]  # torch.compile writes pages
        self.unsupported.append({**subject, "error": reason})
        if measure.DEVICE == "cuda":
            torch.cuda.empty_cache()
        pytest.skip(f"{subject['impl']} cannot run this case: {reason}")

    def reasons(self) -> list[str]:
        """What is unsupported, a line for each rival and reason."""
        counts = Counter((each["impl"], each["error"][:120]) for each in self.unsupported)
        return [f"{impl} ({count}): {reason}" for (impl, reason), count in counts.items()]
