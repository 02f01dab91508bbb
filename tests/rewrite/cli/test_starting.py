"""The ways to start the command line, its help, wrong usage."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import rewrite
from tests.rewrite.cli.running import ROOT, fails, fresh, run


@pytest.mark.parametrize(("words", "told"), [("apply --help", "--trust-pickle"), ("passes", "dyt"), ("passes dyt", "alpha")])
def test_help_and_the_list_of_passes_import_no_torch(words: str, told: str) -> None:
    code = (
        f"import sys; sys.argv = ['rewrite', *{words.split()!r}]\n"
        "from rewrite.cli.commands import main\n"
        "try: main()\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    text = fresh(code, ROOT)
    assert text.endswith("0 False False")
    assert told in text


@pytest.mark.parametrize("command", [["cli.py"], ["-m", "rewrite"]], ids=" ".join)
def test_the_ways_to_start_it(command: list[str]) -> None:
    words = [sys.executable, *command, "--version"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, rewrite.__version__)


def test_a_reader_that_went_away_is_no_error() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "rewrite", "passes"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_the_shell_completes_the_names_of_passes() -> None:
    asked = {"_REWRITE_COMPLETE": "complete_bash", "COMP_WORDS": "rewrite apply m.pt --pass dy", "COMP_CWORD": "4"}
    words = [sys.executable, "-m", "rewrite"]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()) == (0, ["dyt"])


def test_wrong_usage_is_one_line() -> None:
    for words in (["--bogus"], ["bogus"], ["apply"], ["show", "a.pt", "b.pt"], ["passes", "--seed", "x"]):
        error = fails(*words)
        assert "\n" not in error
        assert "--help" in error


def test_wrong_usage_exits_2() -> None:
    assert "No such option" in run("apply", "model.pt", "--bogus", code=2).stderr
    assert "No such command" in run("bogus", code=2).stderr
