"""What the user can mend is one line and exit code 2, and all stays as it was."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.rewrite.cli.running import ESCAPE, MLP_INPUTS, changed_files, contents, fails, mlp, run


def test_a_broken_promise_leaves_all_as_it_was(model: Path, tmp_path: Path, own_passes: None) -> None:
    Path("out.pt").write_bytes(b"precious")
    before = contents(tmp_path)
    error = fails("apply", model, "-p", "liar", *MLP_INPUTS, "-o", "out.pt", "--report", "r.json")
    assert "pass liar broke its contract (forward same, backward same)" in error
    assert {name.partition("/")[0].partition("-")[0] for name in changed_files(tmp_path, before)} == {"crash"}


def test_a_failing_write_leaves_all_as_it_was(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.pt").write_bytes(b"precious")
    before = contents(tmp_path)

    def fill(value: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fill)
    error = fails("apply", model, "-p", "dyt", *MLP_INPUTS, "-o", "out.pt")
    assert error == f"cannot write out.pt: the disk of {tmp_path} has no room for it (No space left on device)"
    assert changed_files(tmp_path, before) == set()
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == []


def test_a_report_on_a_full_disk_names_the_disk(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r.json").write_text("precious")
    before = contents(tmp_path)
    monkeypatch.setattr(Path, "write_text", _raising(OSError(28, "No space left on device")))
    error = fails("apply", model, "-p", "dyt", *MLP_INPUTS, "--report", "r.json")
    assert error == f"cannot write r.json: the disk of {tmp_path} has no room for it (No space left on device)"
    assert changed_files(tmp_path, before) == set()


@pytest.mark.usefixtures("own_passes")
def test_a_bug_is_named_as_such_and_keeps_its_traceback(model: Path) -> None:
    told = run("apply", model, "-p", "broken", *MLP_INPUTS, code=1).stderr
    assert told.startswith("error: this is a bug of rewrite: ZeroDivisionError: not foreseen (own_passes.py:")
    assert told.count("\n") == 1
    full = run("apply", model, "-p", "broken", *MLP_INPUTS, "--traceback", code=1).stderr
    assert full.startswith("Traceback")
    assert full.endswith(told)
    assert "interrupted" in run("apply", model, "-p", "interrupted", *MLP_INPUTS, code=130).stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["-p", "dyt", "-o", "x.foo"], "cannot write x.foo: unknown suffix .foo; give .pt (your class again), .pt2"),
        (["-p", "dyt", "-o", "x.safetenors"], "unknown suffix .safetenors; did you mean '.safetensors'?"),
        (["-p", "dyt", "-o", "."], "cannot write .: the folder is there and not empty"),
        (["-p", "dyt", "-o", "model.pt"], "cannot write model.pt: it is an input of this run"),
        (["-p", "dyt", "-o", "nowhere/x.pt"], "cannot write nowhere/x.pt: there is no folder nowhere"),
        (["-p", "dyt", "--weights", "w.pt", "-o", "w.pt"], "there is no file w.pt"),
        (["-p", "dyt", "--report", "model.pt"], "cannot write model.pt: it is an input of this run"),
        (["-p", "dyt", "--report", "model.dyt.pt"], "--report and --output are both model.dyt.pt"),
        (["-p", "dyt", "--data", "data.pt"], "--data: there is no file data.pt"),
        ([], "no pass is given: add --pass NAME"),
        (["-p", "dyt,dyt"], "--pass takes one pass, not 'dyt,dyt'"),
        (["-p", "dyt", "--pipeline", "dyt"], "--pass and --pipeline are two ways to say the same"),
        (["-p", "dty"], "there is no pass 'dty'; did you mean 'dyt'?"),
        (
            ["--pipeline", "dyt,dyt{alpha=x}"],
            "option 'alpha' of pass 'dyt' expects float, got 'x'\n  dyt,dyt{alpha=x}\n          ^",
        ),
        (["--pipeline", "dyt{alhpa=1}"], "pass 'dyt' has no option 'alhpa'; did you mean 'alpha'?\n  dyt{alhpa=1}\n      ^"),
        (
            ["-p", "dyt{alpha=inf}"],
            "it must be at least -10000, at most 10000\n  dyt{alpha=inf}\n      ^",
        ),
        (
            ["-p", "dyt{alpha=nan}"],
            "it must be at least -10000, at most 10000\n  dyt{alpha=nan}\n      ^",
        ),
        (["-p", "dyt", "--seed", "-1"], "Invalid value for '--seed'"),
        (["-p", "dyt", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["-p", "dyt", "-o", "x" * 300 + ".pt"], "the name is too long for a file; give a shorter one by -o"),
        (["--pipeline", "dyt," * 49_999 + "dyt{"], ",dyt,dyt{\n" + " " * 78 + "^"),
        (["-p", "dyt{alpha=1"], "expected an option or '}'\n  dyt{alpha=1\n             ^"),
    ],
)
def test_mistakes_are_told_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str
) -> None:
    def work(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was read")

    monkeypatch.setattr("rewrite.sources.models.read_model", work)
    before = contents(tmp_path)
    assert expected in fails("apply", model, *arguments)
    assert changed_files(tmp_path, before) == set()


def test_a_selector_that_matches_nothing(model: Path) -> None:
    error = fails("apply", model, "-p", "dyt{where=blocks.*}", *MLP_INPUTS)
    assert error == "where=blocks.* matches none of the 2 places this pass can change; there are 1, 4"


def _saved(value: Any) -> Callable[[Path], None]:
    return lambda path: torch.save(value, path)


class _Attack:
    def __reduce__(self) -> Any:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda path: None, "there is no file bad.pt"),
        (lambda path: path.touch(), "bad.pt is empty"),
        (lambda path: path.write_bytes(b"GIF89a" * 50), "bad.pt is not a file saved by torch.save"),
        (lambda path: path.write_bytes(Path("model.pt").read_bytes()[:-700]), "bad.pt is damaged or cut short"),
        (_saved(mlp().state_dict()), "bad.pt holds a dict with the keys 0.weight, 0.bias, 1.weight, ..., not a module"),
        (_saved(_Attack()), "--trust-pickle"),
        (_saved(torch.zeros(3)), "bad.pt holds a tensor, not a module"),
    ],
    ids=["missing", "empty", "foreign", "cut", "state_dict", "hostile", "tensor"],
)
def test_bad_files(model: Path, tmp_path: Path, write: Callable[[Path], None], expected: str) -> None:
    write(Path("bad.pt"))
    before = contents(tmp_path)
    for command in (("apply", "bad.pt", "-p", "dyt", "-o", "out.pt"), ("show", "bad.pt")):
        error = fails(*command)
        assert expected in error
        assert "\n" not in error
    assert changed_files(tmp_path, before) == set()


def test_bad_programs(model: Path) -> None:
    Path("bad.pt2").write_bytes(b"no zip")
    for arguments, expected in (
        (["bad.pt2"], "bad.pt2"),
        (["bad.pt2", "-o", "x.pt"], "bad.pt2 holds a program and no class to give back; write x.pt2"),
        (["bad.pt2", "--inputs", "2x8"], "--inputs does not go with bad.pt2"),
        (["bad.pt2", "--weights", "model.pt"], "--weights does not go with bad.pt2"),
        (["other.pt2"], "there is no file other.pt2"),
    ):
        assert expected in fails("apply", *arguments, "-p", "dyt")


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("0x8", "'0x8' has a size of 0"),
        ("100000x100000x1000", "'100000x100000x1000' has more than 2,147,483,648 elements"),
        ("x".join(["1"] * 200), "has 200 dimensions; at most 25 are possible"),
        ("9" * 5000 + "x2", "has more than 2,147,483,648 elements"),
        ("int64[2,8;0..1e30]", "is more than torch.int64 holds"),
        ("float32[2,8;0..1e999]", "is more than torch.float32 holds"),
        ("1" * 5000, "is more than a number can hold"),
        ("2x7", "cannot capture Sequential"),
        (
            "float64[2,8]",
            "does not run .*: RuntimeError: .*; its parameters are float32, and the inputs hold float64",
        ),
        ("float16[2,8]", "its parameters are float32, and the inputs hold float16"),
        ("int64[2,8]", "its parameters are float32, and the inputs hold int64"),
        ("bool[2,8]", "its parameters are float32, and the inputs hold bool"),
        ("True", "must be Tensor, not bool"),
        ("model.pt", "--inputs: cannot read model.pt: .*Unsupported global: GLOBAL torch.nn.modules.container.Sequential;"),
    ],
    ids=lambda value: value[:24],
)
def test_bad_inputs(model: Path, tmp_path: Path, inputs: str, expected: str) -> None:
    before = contents(tmp_path)
    error = fails("apply", model, "-p", "dyt", "--inputs", inputs)
    assert re.search(expected, error)
    assert "\n" not in error
    assert len(error) < 500
    assert changed_files(tmp_path, before) == set()


def _raising(error: BaseException) -> Callable[..., Any]:
    def action(*args: Any, **kwargs: Any) -> Any:
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "there is not enough memory for this"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OSError(28, "No space left on device", "x"), "No space left on device: x"),
    ],
    ids=["MemoryError", "allocator", "RecursionError", "OSError"],
)
def test_what_the_machine_refuses_is_no_bug(
    model: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, expected: str
) -> None:
    monkeypatch.setattr("rewrite.sources.models.read_model", _raising(error))
    assert expected in fails("show", model)


def test_a_terminal_is_not_taken_over_by_a_name() -> None:
    assert ESCAPE not in fails("show", f"{ESCAPE}]0;title{chr(7)}.pt")


def test_inputs_that_cannot_be_inferred(model: Path) -> None:
    assert "pass --inputs" in fails("apply", model, "-p", "dyt")


def test_a_line_break_in_a_name_does_not_break_the_line(model: Path) -> None:
    assert "there is no file no\\nfile.pt" in fails("show", "no\nfile.pt")
    assert "there is no file x\\ny.pt" in fails("apply", model, "-p", "dyt", *MLP_INPUTS, "--data", "x\ny.pt")
    model.rename("a\nb.pt")
    text = run("apply", "a\nb.pt", "-p", "dyt", *MLP_INPUTS).stdout
    assert "wrote a\\nb.dyt.pt: Sequential" in text
    assert Path("a\nb.dyt.pt").exists()
