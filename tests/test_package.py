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

if not ROOT.joinpath("dlu_triton").exists():
    pytest.skip("builds the package beside the tests", allow_module_level=True)
if importlib.util.find_spec("hatchling") is None:
    pytest.skip("builds with hatchling", allow_module_level=True)


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
        generated = re.compile(r"PKG-INFO|.*__pycache__/.*")
        paths = [path for path in paths if not generated.fullmatch(path)]
    return {path for path in paths if not path.startswith(".")}


def build(kind, source, folder, **surroundings):
    """By the build backend as `python -m build` calls it, without an environment of its own."""
    code = f"from hatchling import build; build.build_{kind}({str(folder)!r})"
    run(sys.executable, "-c", code, cwd=source, **surroundings)
    (path,) = folder.iterdir()
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory):
    return build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(sdist, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return folder / NAME


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
    described = {f"{INFO}/{name}" for name in ("METADATA", "RECORD", "WHEEL", *licences)}
    assert set(contents(wheel)) == package | described


def test_sdist_holds_the_project(sdist):
    """Tests with their scripts and data, and what these read."""
    with tarfile.open(sdist) as archive:
        found = {member.name.removeprefix(f"{NAME}/") for member in archive.getmembers() if member.isfile()}
    assert found == tracked_files() | {"PKG-INFO", ".gitignore"}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "constraints.txt"} < found
    assert {"tests/conftest.py", "tests/layouts.py", "tests/data/dlu_0.npz"} < found


def test_builds_are_the_same_bytes(wheel, sdist, unpacked, tmp_path):
    """From the clone and from its source distribution, in other places, at other times, by other users."""
    source = shutil.copytree(unpacked, tmp_path / "elsewhere")
    for path in source.rglob("*"):
        os.utime(path, (time.time(), time.time()))
        path.chmod(0o700 if path.is_dir() else 0o600)
    variables = {"TZ": "America/Lima", "LC_ALL": "C", "PYTHONHASHSEED": "7"}
    for kind, path in (("wheel", wheel), ("sdist", sdist)):
        again = build(kind, source, tmp_path / kind, umask=0o077, **variables)
        assert again.name == path.name
        assert again.read_bytes() == path.read_bytes()


def test_archives_say_nothing_of_who_made_them(wheel, sdist):
    """Neither of users nor of the time."""
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert {(each.uid, each.gid, each.uname, each.gname, each.mode) for each in members} == {(0, 0, "", "", 0o644)}
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} == {0o644}
        times = {datetime(*entry.date_time, tzinfo=UTC).timestamp() for entry in archive.infolist()}
    header = sdist.read_bytes()[:8]
    assert {int.from_bytes(header[4:], "little"), *(each.mtime for each in members)} == times
    assert len(times) == 1
    assert max(times) < time.time() - 24 * 3600


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


def required(extra):
    """By an extra, and by those of the package itself that it names."""
    for each in map(Requirement, PROJECT["optional-dependencies"][extra]):
        if each.name == PROJECT["name"]:
            for other in each.extras:
                yield from required(other)
        else:
            yield each


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
    expected = {str(Requirement(each)) for each in PROJECT["dependencies"]}
    for extra in extras:
        expected |= {str(Requirement(f'{each}; extra == "{extra}"')) for each in required(extra)}
    assert {str(Requirement(each)) for each in found.get_all("Requires-Dist")} == expected


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
    for module in ("PIL", "sklearn", "mmcv", "mmengine"):  # which the demos and integrations import
        pytest.importorskip(module, exc_type=ImportError)
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
