"""The top-level folders are the package: each is mapped in pyproject.toml, and a wheel holds nothing else."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
DATA = {"llmopt.tiny_llama": "examples/tiny-llama"}  # holds no code: the bundled model
MAPPING = {package: folder for package, folder in SETUPTOOLS["package-dir"].items() if package not in DATA}
NOT_PACKAGED = {"tests", "benchmarks", "examples", "docs", "build", "dist"}


def folders_with_code():
    """Yield every folder that holds Python files, relative to the repository."""
    for folder, names, files in os.walk(ROOT):
        relative = Path(folder).relative_to(ROOT)
        names[:] = [name for name in names if not name.startswith((".", "_")) and not name.endswith(".egg-info")]
        if relative == Path():
            names[:] = [name for name in names if name not in NOT_PACKAGED and not name.endswith("-output")]
        elif any(name.endswith(".py") for name in files):
            yield relative.as_posix()


def test_every_folder_with_code_is_mapped():
    assert sorted(folders_with_code()) == sorted(MAPPING.values())


def test_every_mapped_folder_is_packaged_under_its_own_name():
    assert SETUPTOOLS["package-dir"] == MAPPING | DATA
    assert sorted(MAPPING | DATA) == sorted(SETUPTOOLS["packages"])
    for package, folder in MAPPING.items():
        assert package == ("llmopt" if folder == "llmopt" else f"llmopt.{folder.replace('/', '.')}")
        assert (ROOT / folder / "__init__.py").is_file()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from a copy, so that nothing is left in the working tree."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in {value.partition("/")[0] for value in (MAPPING | DATA).values()}:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if "No matching distribution found for setuptools" in built.stderr:
        pytest.skip("pip cannot reach a package index to build the wheel")
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(target.glob("*.whl")))


def test_the_wheel_holds_only_llmopt(wheel):
    assert {name.partition("/")[0].partition("-")[0] for name in wheel.namelist()} == {"llmopt"}


def test_the_wheel_holds_every_module(wheel):
    packed = {name for name in wheel.namelist() if name.startswith("llmopt/")}
    for package, folder in MAPPING.items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in packed
    assert {"llmopt/py.typed", "llmopt/evaluation/report/style.css"} <= packed
