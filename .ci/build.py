"""Build the source distribution and, from it, the wheel: the same bytes wherever, whenever and by whomever.

    pip install -c constraints.txt setuptools && python .ci/build.py dist

takes the files of a clone or, with --source, of an unpacked source distribution. Times are the day of the newest
release in CHANGELOG.md. Other versions of setuptools write other metadata, and other zlibs may compress to other bytes.
"""

import argparse
import gzip
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parents[1]
BACKEND = "import os, sys; os.umask(0o022); from setuptools import build_meta; build_meta.build_{}(sys.argv[1])"
GENERATED = re.compile(r"PKG-INFO|setup\.cfg|.*\.egg-info/.*|(.*/)?__pycache__/.*")


def released(source: Path) -> int:
    """Midnight of the newest release, in seconds since 1970."""
    text = source.joinpath("CHANGELOG.md").read_text(encoding="utf-8")
    found = re.search(r"^## .+ \((\d{4}-\d\d-\d\d)\)$", text, re.MULTILINE)
    if found is None:
        raise SystemExit("CHANGELOG.md has no release with its date, such as ## 0.1.0 (2026-11-27)")
    return int(datetime.fromisoformat(found[1]).replace(tzinfo=UTC).timestamp())


def files(source: Path) -> list[str]:
    """Paths of what the project is made of, without what installing, building and testing leave behind."""
    if source.joinpath(".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        paths = subprocess.run(command, cwd=source, capture_output=True, text=True, check=True).stdout.split("\0")
    else:
        paths = [path.relative_to(source).as_posix() for path in source.rglob("*")]
    return [path for path in paths if source.joinpath(path).is_file() and not GENERATED.fullmatch(path)]


def backend(kind: str, source: Path, folder: Path, time: int) -> Path:
    """What setuptools builds, as `python -m build` has it, in the environment that this runs in."""
    folder.mkdir()
    environment = {**os.environ, "SOURCE_DATE_EPOCH": str(time)}
    command = [sys.executable, "-c", BACKEND.format(kind), str(folder)]
    process = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        raise SystemExit(process.stdout + process.stderr)
    (path,) = folder.iterdir()
    return path


def normalised(sdist: Path, path: Path, time: int) -> None:
    """A copy of a source distribution without the times, owners and permissions that setuptools puts there."""
    with (
        tarfile.open(sdist) as found,
        path.open("wb") as file,
        gzip.GzipFile("", "wb", compresslevel=9, fileobj=file, mtime=time) as packed,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for member in sorted(found.getmembers(), key=lambda member: member.name):
            entry = tarfile.TarInfo(member.name)
            entry.type, entry.size, entry.mtime = member.type, member.size, time
            entry.mode = 0o755 if member.isdir() else 0o644
            archive.addfile(entry, found.extractfile(member))


def build(source: Path, out: Path) -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    time = released(source)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        project = folder / "project"
        for path in files(source):
            project.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / path, project / path)
        found = backend("sdist", project, folder / "sdist", time)
        sdist = out / found.name
        normalised(found, sdist, time)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder / "unpacked", filter="data")
        (unpacked,) = folder.joinpath("unpacked").iterdir()
        wheel = backend("wheel", unpacked, folder / "wheel", time)
        return sdist, Path(shutil.copyfile(wheel, out / wheel.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the two files")
    parser.add_argument("--source", type=Path, default=ROOT, help="a clone, or an unpacked source distribution")
    options = parser.parse_args()
    for path in build(options.source.resolve(), options.out.resolve()):
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")


if __name__ == "__main__":
    main()
