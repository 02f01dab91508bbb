"""What counts as installed: by the folder it lies in, and not by what its path looks like."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rewrite.sources.installed import Installed


def put(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text)


def test_installed_packages_and_this_one_count() -> None:
    installed = Installed.here()
    assert installed.holds("torch.nn")
    assert installed.holds("rewrite.files.store")
    assert installed.defines("torch.nn.modules.linear", "Linear")
    assert not installed.defines("torch.nn.modules.linear", "Module")


@pytest.mark.parametrize("folder", ["site-packages", "lib/python3.11/site-packages", "dist-packages/site-packages.d"])
def test_a_path_that_looks_like_it_does_not(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / folder, "looks_installed", "class Net: pass\nNAME = 'evil::op'\n")
    monkeypatch.syspath_prepend(str(tmp_path / folder))
    installed = Installed.here()
    assert not installed.holds("looks_installed")
    assert not installed.defines("looks_installed", "Net")
    assert not installed.registers("looks_installed", "evil::op")
    assert "looks_installed" not in sys.modules


@pytest.mark.parametrize("module", ["", "os.path ", "torch..nn", "__main__", "rewrite.__main__", "torch.nn;x", "../torch"])
def test_what_is_no_module_does_not(module: str) -> None:
    assert not Installed.here().holds(module)


def test_the_tests_of_an_editable_package_do_not() -> None:
    assert not Installed.here().holds("tests.models.stress")


def test_a_module_registers_the_operators_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, "has_operators", "@custom_op('mine::add', mutates_args=())\ndef add(): pass\n")
    monkeypatch.setattr("site.getsitepackages", lambda: [str(tmp_path)])
    monkeypatch.syspath_prepend(str(tmp_path))
    installed = Installed.here()
    assert installed.registers("has_operators", "mine::add")
    assert not installed.registers("has_operators", "add::mine")
