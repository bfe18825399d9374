"""The package gpt2fast.kernels is found in a checkout, in a wheel and in an editable install, never as `kernels`."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.tools.checkout import CHECKOUT

SHIPPED = ("pyproject.toml", "README.md", "LICENSE", "gpt2fast", "kernels")
PROBE = """
import importlib.util, json, sys
import gpt2fast.kernels.registration as registration
import gpt2fast.ops
assert "kernels" not in sys.modules
spec = importlib.util.find_spec("kernels")
print(json.dumps([registration.__name__, registration.__file__, list(spec.submodule_search_locations) if spec else []]))
"""
NAME = "gpt2fast.kernels.registration"
# Read from the metadata: find_spec("pip") would make setuptools' hook forget distutils, which Inductor needs later.
INSTALLED = {package.name for package in importlib.metadata.distributions()}
BUILDS = {"pip", "setuptools"} <= INSTALLED and int(importlib.metadata.version("setuptools").split(".")[0]) >= 77

pytestmark = pytest.mark.long
needs_builder = pytest.mark.skipif(not BUILDS, reason="building needs pip and setuptools >= 77 in this environment")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, so that the build leaves nothing in the real one."""
    copy = tmp_path_factory.mktemp("somewhere") / "checkout"
    copy.mkdir()
    for name in SHIPPED:
        source = CHECKOUT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    return copy


def pip(*args: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, *offline], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    copy = shutil.copytree(checkout, folder / "source")  # setuptools builds inside the source
    pip("wheel", "--wheel-dir", folder, copy)
    (path,) = folder.glob("*.whl")
    return path


def probe(python: Path | str, cwd: Path, pythonpath: Path | str) -> tuple[str, Path, list[str]]:
    """Import gpt2fast.kernels.registration in `cwd`, and return its name and file, and where a `kernels` would be."""
    environment = os.environ | {"PYTHONPATH": str(pythonpath)}
    done = subprocess.run([python, "-c", PROBE], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    name, file, top_level = json.loads(done.stdout)
    return name, Path(file), top_level


def test_a_plain_checkout(checkout, tmp_path):
    name, file, _ = probe(sys.executable, tmp_path, checkout)
    assert (name, file) == (NAME, checkout / "kernels" / "registration.py")


def test_a_checkout_as_the_current_folder(checkout):
    name, file, _ = probe(sys.executable, checkout, "")
    assert (name, file) == (NAME, checkout / "kernels" / "registration.py")


@needs_builder
def test_the_wheel_has_all_folders_and_the_kernels_inside_gpt2fast(wheel, checkout):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {
        f"gpt2fast/{path.relative_to(checkout / 'gpt2fast')}" for path in checkout.glob("gpt2fast/**/*.py")
    } | {f"gpt2fast/kernels/{path.name}" for path in checkout.glob("kernels/*.py")}


@needs_builder
def test_an_unpacked_wheel(wheel, tmp_path):
    site, cwd = tmp_path / "site", tmp_path / "cwd"
    cwd.mkdir()
    zipfile.ZipFile(wheel).extractall(site)
    name, file, top_level = probe(sys.executable, cwd, site)
    assert (name, file) == (NAME, site / "gpt2fast" / "kernels" / "registration.py")
    assert not [place for place in top_level if str(tmp_path) in place]


@needs_builder
@pytest.mark.parametrize("mode", ["lenient", "strict"])
def test_an_editable_install(mode, checkout, tmp_path):
    source, venv, cwd = tmp_path / "source", tmp_path / "venv", tmp_path / "cwd"
    shutil.copytree(checkout, source)
    cwd.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    (site,) = venv.glob("[Ll]ib/**/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", python, "install", "--editable", source, "--config-settings", f"editable_mode={mode}")
    name, file, top_level = probe(python, cwd, "")
    assert (name, file.resolve()) == (NAME, source / "kernels" / "registration.py")
    assert not [place for place in top_level if str(tmp_path) in place]
