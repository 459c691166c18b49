"""Run tests with other versions of Python, PyTorch and Triton, each in a virtual environment of its own.

    python .ci/matrix.py                                              # oldest and newest, the tests that CI runs
    python .ci/matrix.py oldest 3.12/2.11.0/3.6.0 -- tests/test_compile.py tests/test_export.py

prints a table. Versions are "oldest", which is the lower bounds of pyproject.toml; "newest", which is what pip finds
without any bound; "tested", which is constraints.txt; or versions of Python, torch and Triton, and of other packages as
in 3.12/2.11.0/3.6.0/numpy==2.0. PyTorch's builds for CUDA take several gigabytes each; with --keep, environments stay
and are used again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
COLUMNS = ("python", "torch", "triton", "numpy", "passed", "failed", "skipped", "seconds")
FOUND = """
import platform, numpy, torch, triton
print(platform.python_version(), *(package.__version__ for package in (torch, triton, numpy)))
"""


def lower_bounds() -> dict[str, str]:
    """By package, from dependencies and extras; that of Python among them."""
    requirements = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in requirements)
    return {"python": PROJECT["requires-python"].removeprefix(">="), **{m[1]: m[2] for m in found if m}}


def constraints(versions: str) -> tuple[str, list[str]]:
    """The version of Python, and lines for pip."""
    oldest = lower_bounds()
    if versions == "oldest":
        return oldest.pop("python"), [f"{name}=={bound}" for name, bound in oldest.items()]
    if versions == "newest":
        return newest_python(), []
    if versions == "tested":
        return oldest["python"], ROOT.joinpath("constraints.txt").read_text().splitlines()
    python, torch, triton, *others = versions.split("/")
    return python, [f"torch=={torch}", f"triton=={triton}", *others]


def pythons() -> Iterator[tuple[tuple[int, ...], Path]]:
    """Those on the path and those of pyenv, by version."""
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    folders += sorted(Path.home().glob(".pyenv/versions/*/bin"))
    for path in (path for folder in folders for path in folder.glob("python3.*")):
        if re.fullmatch(r"python3\.\d+", path.name):
            code = "import sys, ensurepip; print(*sys.version_info[:2])"
            found = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
            if found.returncode == 0:  # stubs of pyenv's may lead nowhere
                yield tuple(int(part) for part in found.stdout.split()), path


def newest_python() -> str:
    return ".".join(str(part) for part in max(pythons())[0])


def environment(folder: Path, versions: str) -> Path:
    """The interpreter of an environment with these versions and all that tests need."""
    version, lines = constraints(versions)
    base = next((path for found, path in pythons() if ".".join(map(str, found)) == version), None)
    if base is None:
        raise SystemExit(f"there is no Python {version} here")
    subprocess.run([base, "-m", "venv", folder], check=True)
    listed = folder / "constraints.txt"
    listed.write_text("\n".join(lines))
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", "-c", listed]
    subprocess.run([*install, "-e", f"{ROOT}[test]"], check=True)
    return python


def run(python: Path, selection: list[str]) -> tuple[dict[str, object], list[str]]:
    """A row of the table, and the tests that failed."""
    versions = subprocess.run([python, "-c", FOUND], capture_output=True, text=True, check=True).stdout.split()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        command = [python, "-m", "pytest", "--quiet", f"--junitxml={report}", *selection]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}, check=False)
        cases = xml.parse(report).findall(".//testcase") if report.exists() else []
    of = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in (*of["failure"], *of["error"])]
    passed = len(cases) - len(failed) - len(of["skipped"])
    if not cases:
        failed = ["nothing ran"]
    row = (*versions, passed, len(failed), len(of["skipped"]), round(time.perf_counter() - start))
    return dict(zip(COLUMNS, row, strict=True)), failed


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="oldest, newest, tested, PYTHON/TORCH/TRITON[/PACKAGE==...]")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, which stay there")
    options = parser.parse_args(arguments[:split])
    rows, failures = [], []
    for versions in options.versions or ("oldest", "newest"):
        folder = Path(options.keep or tempfile.mkdtemp()).resolve() / versions.replace("/", "-")
        try:
            row, failed = run(environment(folder, versions), arguments[split + 1 :])
        finally:
            if not options.keep:
                shutil.rmtree(folder.parent)
        rows.append(row)
        failures += [f"{versions}: {name}" for name in failed]
    print(*failures, sep="\n")
    for row in ({name: name for name in COLUMNS}, *rows):
        print("".join(f"{row[name]!s:>{14 if name in COLUMNS[:4] else 9}}" for name in COLUMNS))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
