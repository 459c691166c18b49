"""Run tests of the built package with other versions of Python, PyTorch and Triton.

    python .ci/matrix.py                                              # oldest and newest, the tests that CI runs
    python .ci/matrix.py oldest 3.12/2.11.0/3.6.0 -- tests/test_compile.py tests/test_export.py

prints a table. A source distribution is built, and from it a wheel. For each row this wheel is installed with all that
it asks for, in a virtual environment of the row's own, and tested by the tests of the source distribution.

Versions are "oldest", which is the lower bounds of pyproject.toml; "newest", which is what pip finds without any bound;
"tested", which is constraints.txt; or versions of Python, torch and Triton, and of other packages as in
3.12/2.11.0/3.6.0/numpy==2.0. PyTorch's builds for CUDA take several gigabytes each; with --keep, environments stay and
are used again.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
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
import pathlib, platform, sys, dlu_triton, numpy, torch, triton
assert pathlib.Path(dlu_triton.__file__).is_relative_to(sys.prefix), f"imports {dlu_triton.__file__}"
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


def distributions(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it, by the newest tools."""
    python, out = folder / "environment" / "bin" / "python", folder / "out"
    subprocess.run([sys.executable, "-m", "venv", folder / "environment"], check=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", "build"], check=True)
    subprocess.run([python, "-m", "build", "--outdir", out, ROOT], stdout=subprocess.DEVNULL, check=True)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def tests_of(sdist: Path, folder: Path) -> Path:
    """The source distribution unpacked, without the package, so that its tests import the one that is installed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    shutil.rmtree(tree / "dlu_triton")
    return tree


def environment(folder: Path, versions: str, wheel: Path) -> Path:
    """The interpreter of an environment with the wheel, these versions and all that tests need."""
    version, lines = constraints(versions)
    base = next((path for found, path in pythons() if ".".join(map(str, found)) == version), None)
    if base is None:
        raise FileNotFoundError(f"there is no Python {version} here")
    subprocess.run([base, "-m", "venv", folder], check=True)
    listed = folder / "constraints.txt"
    listed.write_text("\n".join(lines))
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--quiet", "uninstall", "-y", PROJECT["name"]], check=True)  # where environments are kept
    subprocess.run([*pip, "install", "--no-cache-dir", "-c", listed, f"{wheel}[test]"], check=True)
    return python


def outcome(report: Path, status: int) -> tuple[int, list[str], int]:
    """How many tests passed, what failed, and how many were skipped, by pytest's report and exit status."""
    cases = xml.parse(report).findall(".//testcase") if report.exists() else []
    of = {kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")}
    failed = [f"{case.get('classname')}::{case.get('name')}" for case in (*of["failure"], *of["error"])]
    passed = len(cases) - len(failed) - len(of["skipped"])
    if status not in (0, 1) or (status == 1 and not failed):  # interrupted, an internal error, nothing to run
        failed.append(f"pytest exited with {status}")
    elif not cases:
        failed.append("nothing ran")
    return passed, failed, len(of["skipped"])


def run(python: Path, tree: Path, selection: list[str]) -> tuple[dict[str, object], list[str]]:
    """A row of the table, and what failed."""
    found = subprocess.run([python, "-c", FOUND], cwd=tree, stdout=subprocess.PIPE, text=True, check=True)
    start = time.perf_counter()
    report = tree / "report.xml"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = [python, "-m", "pytest", "--quiet", f"--junitxml={report}", *selection]
    status = subprocess.run(command, cwd=tree, env={**os.environ, "PATH": path}, check=False).returncode
    passed, failed, skipped = outcome(report, status)
    row = (*found.stdout.split(), passed, len(failed), skipped, round(time.perf_counter() - start))
    return dict(zip(COLUMNS, row, strict=True)), failed


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("versions", nargs="*", help="oldest, newest, tested, PYTHON/TORCH/TRITON[/PACKAGE==...]")
    parser.add_argument("--keep", type=Path, help="a folder for the environments, which stay there")
    options = parser.parse_args(arguments[:split])
    os.environ.pop("PYTHONPATH", None)  # of a package that is not installed
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as temporary:
        sdist, wheel = distributions(Path(temporary).resolve())
        for versions in options.versions or ("oldest", "newest"):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary).resolve()
                kept = (options.keep or folder).resolve() / versions.replace("/", "-")
                try:
                    python = environment(kept, versions, wheel)
                    row, failed = run(python, tests_of(sdist, folder / "sdist"), arguments[split + 1 :])
                except (FileNotFoundError, subprocess.CalledProcessError) as error:
                    row, failed = {**dict.fromkeys(COLUMNS, "-"), "python": versions, "failed": 1}, [str(error)]
            rows.append(row)
            failures += [f"{versions}: {name}" for name in failed]
    print(*failures, sep="\n")
    for row in ({name: name for name in COLUMNS}, *rows):
        print("".join(f"{row[name]!s:>{14 if name in COLUMNS[:4] else 9}}" for name in COLUMNS))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
