"""The wheel and the source distribution: what is in them, what they say of themselves, and that they work elsewhere."""

import email
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import dlu_triton

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads(ROOT.joinpath("pyproject.toml").read_text())["project"]
CHANGELOG = ROOT.joinpath("CHANGELOG.md").read_text()
RELEASE = re.search(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", CHANGELOG, re.MULTILINE)  # the newest: version and day
NAME = f"dlu_triton-{dlu_triton.__version__}"
INFO = f"{NAME}.dist-info"
BUILD = ROOT / ".ci" / "build.py"

if not ROOT.joinpath("dlu_triton").exists():
    pytest.skip("builds the package beside the tests", allow_module_level=True)
if Version(importlib.metadata.version("setuptools")) < Version("77.0.3"):
    pytest.skip("builds with setuptools 77 or newer", allow_module_level=True)


def run(*command, cwd, umask=-1, **environment):
    environment = {**os.environ, **environment}
    process = subprocess.run(command, cwd=cwd, env=environment, umask=umask, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def tracked_files():
    """Paths of the project's files, but for those of tools that work on a clone."""
    if ROOT.joinpath(".git").exists():
        paths = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
        paths = [path for path in paths if ROOT.joinpath(path).exists()]
    else:  # an unpacked source distribution
        paths = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
        generated = re.compile(r"PKG-INFO|setup.cfg|.*\.egg-info/.*|.*__pycache__/.*")
        paths = [path for path in paths if not generated.fullmatch(path)]
    return {path for path in paths if not path.startswith(".")}


def copied(tmp_path_factory):
    """The project in another place, as building leaves files behind."""
    folder = tmp_path_factory.mktemp("source")
    for path in tracked_files():
        folder.joinpath(path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def build(kind, source, folder):
    """By the build backend as `python -m build` calls it, without an environment of its own."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", copied(tmp_path_factory), tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", copied(tmp_path_factory), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The source distribution and the wheel as `.ci/build.py` makes them of the clone."""
    if not BUILD.exists():
        pytest.skip("is not in source distributions")
    folder = tmp_path_factory.mktemp("released")
    run(sys.executable, BUILD, folder, cwd=folder, TZ="Pacific/Auckland", LC_ALL="C", umask=0o022)
    return {path.suffix: path for path in folder.iterdir()}


def contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def metadata(wheel):
    return email.message_from_bytes(contents(wheel)[f"{INFO}/METADATA"])


def test_wheel_holds_the_package_alone(wheel):
    """All of it, for any platform and Python: no tests, benchmarks or caches."""
    assert wheel.name == f"{NAME}-py3-none-any.whl"
    package = {path for path in tracked_files() if path.startswith("dlu_triton/")}
    assert {"dlu_triton/py.typed", "dlu_triton/data/coffee.jpg", "dlu_triton/data/LICENSE.md"} <= package
    licences = {f"licenses/{path}" for path in PROJECT["license-files"]}
    described = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", *licences)}
    assert set(contents(wheel)) == package | described
    assert contents(wheel)[f"{INFO}/top_level.txt"] == b"dlu_triton\n"


def test_sdist_holds_the_project(sdist):
    """Tests with their scripts and data, and what these read."""
    with tarfile.open(sdist) as archive:
        found = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    generated = {path for path in found if path in ("PKG-INFO", "setup.cfg") or path.startswith("dlu_triton.egg-info/")}
    assert found - generated == tracked_files()
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "constraints.txt"} < found
    assert {"tests/conftest.py", "tests/layouts.py", "tests/data/dlu_0.npz"} < found


def test_wheel_of_the_sdist_is_the_same(wheel, unpacked, tmp_path):
    assert contents(build("wheel", unpacked, tmp_path)) == contents(wheel)


def test_releases_are_the_same_bytes(released, tmp_path):
    """From the clone and from its source distribution, in other places, at other times, by other users."""
    with tarfile.open(released[".gz"]) as archive:
        archive.extractall(tmp_path, filter="data")
    source, out = tmp_path / NAME, tmp_path / "out"
    for path in source.rglob("*"):
        os.utime(path, (time.time(), time.time()))
        path.chmod(0o700)
    variables = {"TZ": "America/Lima", "LC_ALL": "C.UTF-8", "SOURCE_DATE_EPOCH": "1", "PYTHONHASHSEED": "7"}
    run(sys.executable, BUILD, out, "--source", source, cwd=tmp_path, umask=0o077, **variables)
    again = {path.suffix: path for path in out.iterdir()}
    assert set(released) == set(again) == {".gz", ".whl"}
    for suffix, path in released.items():
        assert path.name == again[suffix].name
        assert path.read_bytes() == again[suffix].read_bytes()


def test_releases_say_nothing_of_who_made_them(released):
    """Neither in the archives nor in their headers; times are the release's."""
    day = datetime.fromisoformat(RELEASE[2]).replace(tzinfo=UTC)
    header = released[".gz"].read_bytes()[:10]
    assert header[3] == 0  # no name of a file
    assert int.from_bytes(header[4:8], "little") == day.timestamp()
    with tarfile.open(released[".gz"]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == sorted(member.name for member in members)
    for member in members:
        assert (member.uid, member.gid, member.uname, member.gname) == (0, 0, "", "")
        assert (member.mtime, member.mode) == (day.timestamp(), 0o755 if member.isdir() else 0o644)
    with zipfile.ZipFile(released[".whl"]) as archive:
        for entry in archive.infolist():
            assert datetime(*entry.date_time, tzinfo=UTC) == day
            assert entry.external_attr >> 16 in (0o100644, 0o100664)  # which setuptools gives to RECORD


def test_releases_are_what_tools_build(released, wheel, sdist):
    """But for times and owners: the files of the wheel and of the source distribution are those of the backend."""
    assert contents(released[".whl"]) == contents(wheel)
    found = []
    for path in (released[".gz"], sdist):
        with tarfile.open(path) as archive:
            files = [member for member in archive.getmembers() if member.isfile()]
            found.append({member.name: archive.extractfile(member).read() for member in files})
    assert found[0] == found[1]


def test_the_changelog_has_this_version():
    """Released with its day, or a later version that is being developed."""
    newest = re.search(r"^## (.+)$", CHANGELOG, re.MULTILINE)[1]
    version = Version(dlu_triton.__version__)
    if newest == "Unreleased":
        assert version.is_devrelease
        assert version > Version(RELEASE[1])
    else:
        assert newest == f"{RELEASE[1]} ({RELEASE[2]})"
        assert dlu_triton.__version__ == RELEASE[1]


def test_metadata_is_what_the_project_says(wheel):
    found = metadata(wheel)
    assert (found["Name"], found["Version"]) == (PROJECT["name"], dlu_triton.__version__)
    assert found["Requires-Python"] == PROJECT["requires-python"]
    assert found["License-Expression"] == "MIT"
    assert found.get_all("License-File") == PROJECT["license-files"]
    assert found["Description-Content-Type"] == "text/markdown"
    assert found.get_payload(decode=True).decode() == ROOT.joinpath("README.md").read_text()
    extras = PROJECT["optional-dependencies"]
    assert set(found.get_all("Provides-Extra")) == set(extras)
    expected = [Requirement(each) for each in PROJECT["dependencies"]]
    for extra, requirements in extras.items():
        expected += [Requirement(f'{each}; extra == "{extra}"') for each in requirements]
    assert sorted(map(str, map(Requirement, found.get_all("Requires-Dist")))) == sorted(map(str, expected))


@pytest.mark.skipif(shutil.which("twine") is None, reason="needs twine")
def test_description_renders(wheel, sdist, tmp_path):
    assert run("twine", "check", "--strict", wheel, sdist, cwd=tmp_path).count("PASSED") == 2


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("installs with pip")
    folder = tmp_path_factory.mktemp("installed")
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", folder)
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    return folder


def test_installed_package_is_complete(installed, tmp_path):
    """From outside of the clone: its modules, its data, its version, its command."""
    code = """
import importlib, importlib.metadata, importlib.resources, pkgutil
import dlu_triton
for module in pkgutil.walk_packages(dlu_triton.__path__, "dlu_triton."):
    if module.name != "dlu_triton.__main__":
        importlib.import_module(module.name)
assert importlib.metadata.version("dlu-triton") == dlu_triton.__version__
assert len(importlib.resources.files("dlu_triton").joinpath("data", "coffee.jpg").read_bytes()) > 100_000
print(dlu_triton.__file__)
"""
    for module in ("PIL", "sklearn"):  # which the demos import
        pytest.importorskip(module)
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed))
    assert Path(printed.strip()) == installed / "dlu_triton" / "__init__.py"
    printed = run(sys.executable, "-m", "dlu_triton", "complexity", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "91.2%" in printed


def test_installed_package_passes_tests_of_the_sdist(installed, unpacked, tmp_path):
    """With no other package of that name in reach."""
    shutil.copytree(unpacked / "tests", tmp_path / "tests")
    shutil.copy(unpacked / "pyproject.toml", tmp_path)
    code = """
import sys
import pytest
status = pytest.main(["--quiet", "-p", "no:cacheprovider", "tests/test_by_hand.py"])
print(sys.modules["dlu_triton"].__file__)
sys.exit(status)
"""
    printed = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed), PYTEST_ADDOPTS="")
    assert Path(printed.splitlines()[-1]) == installed / "dlu_triton" / "__init__.py"
    assert re.search(r"\d+ passed", printed)
