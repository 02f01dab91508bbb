"""What an install is: one top-level name, entry points that resolve, and plugins that join it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


def run(*command: str | Path, path: Path | None = None, cwd: Path | None = None) -> str:
    """What the command prints, with `path` as its PYTHONPATH; it must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copy_of(folder: Path, to: Path) -> Path:
    """A copy to build in, so that no build folder stays in the checkout or comes from it."""
    unwanted = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests", "docs", "benchmarks")
    return Path(shutil.copytree(folder, to, ignore=unwanted))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, freshly built."""
    work = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", *OFFLINE, "--wheel-dir", work, copy_of(ROOT, work / "source"))
    (built,) = work.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the third-party plugin installed in it."""
    work = tmp_path_factory.mktemp("plugin")
    source = copy_of(ROOT / "tests" / "plugin", work / "source")
    run(*PIP, "install", *OFFLINE, "--target", work / "site", source)
    return work / "site"


def test_only_rewrite_lands_at_the_top(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"rewrite"}
    assert "rewrite/py.typed" in names


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    folders = {"rewrite": "rewrite", "passes": "rewrite/passes", "backends": "rewrite/backends"}
    expected = {
        f"{inside}/{file.relative_to(ROOT / folder)}"
        for folder, inside in folders.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_every_entry_point_resolves() -> None:
    groups = {**PROJECT["entry-points"], "scripts": PROJECT["scripts"]}
    values = [value for group in groups.values() for value in group.values()]
    code = "import sys; from pkgutil import resolve_name; [resolve_name(value) for value in sys.argv[1:]]"
    run(sys.executable, "-c", code, *values, cwd=Path("/"))


@pytest.mark.parametrize("cwd", [ROOT, ROOT.parent, Path("/")])
def test_the_installed_package_is_whole_from_anywhere(cwd: Path) -> None:
    code = "import rewrite, rewrite.passes, rewrite.backends as b; print(b.__name__, rewrite.pass_names())"
    assert run(sys.executable, "-c", code, cwd=cwd).startswith("rewrite.backends ('")


def test_the_wheel_is_whole_where_nothing_else_is(wheel: Path, tmp_path: Path) -> None:
    run(*PIP, "install", *OFFLINE, "--target", tmp_path / "site", wheel)
    site = tmp_path / "site"
    code = "import rewrite.passes as p, rewrite.backends as b; print(p.__path__ + b.__path__)"
    folders = [site / "rewrite" / "passes", site / "rewrite" / "backends"]
    assert run(sys.executable, "-c", code, path=site, cwd=tmp_path).strip() == str([str(f) for f in folders])


@pytest.mark.parametrize("cwd", [ROOT, Path("/")])
def test_the_command_line_starts_in_three_ways(cwd: Path) -> None:
    installed = Path(sys.executable).with_name("rewrite")
    for start in ([sys.executable, ROOT / "cli.py"], [installed], [sys.executable, "-m", "rewrite"]):
        assert "dyt" in run(*start, "passes", cwd=cwd)


def test_a_checkout_that_is_not_installed_says_what_to_run(tmp_path: Path) -> None:
    source = copy_of(ROOT, tmp_path / "source")
    # -S -E: as without any installed package
    done = subprocess.run(
        [sys.executable, "-S", "-E", source / "cli.py", "passes"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "pip install -e ." in done.stderr


def test_a_plugin_joins_the_passes(plugin: Path) -> None:
    code = "import rewrite; print(rewrite.pass_names(), rewrite.get_pass('scale_probe')(norm='mean').text)"
    printed = run(sys.executable, "-c", code, path=plugin)
    assert "'dyt'" in printed
    assert "scale_probe{norm=mean}" in printed


def test_a_plugin_is_shown_by_the_command_line(plugin: Path) -> None:
    assert "scale_probe" in run(sys.executable, ROOT / "cli.py", "passes", path=plugin)
    assert "how a scale is taken" in run(sys.executable, ROOT / "cli.py", "passes", "scale_probe", path=plugin)
