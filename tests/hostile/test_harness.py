"""The oracle sees what it is there to see: each kind of wrong, done by a file that is trusted on purpose."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.hostile.harness import MARKER, Case, Oracle


class Evil:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


DEEDS = {
    "compiled text": (Evil(eval, f"1 if {MARKER!r} else 0"), "compiled text of the file"),
    "executed text": (Evil(exec, f"{MARKER} = 1"), "executed text of the file"),
    "subprocess.Popen": (Evil(subprocess.call, ["true"]), "subprocess.Popen"),
    "socket": (Evil(socket.socket), "socket.__new__"),
    "imported antigravity": (Evil(__import__, "antigravity"), "imported antigravity"),
    "open": (Evil(open, "ran", "w"), "open of "),
    "native write": (Evil(torch.from_file, "ran", True, 4), "left or changed ran"),
}


@pytest.mark.parametrize(("deed", "fault"), DEEDS.values(), ids=DEEDS.keys())
def test_each_deed_is_seen(oracle: Oracle, tmp_path: Path, deed: Evil, fault: str) -> None:
    model: Any = nn.Linear(2, 2)
    model.evil = deed
    torch.save(model, tmp_path / "m.pt")
    case = Case(("show", "m.pt", "--inputs", "2x2", "--trust-pickle"), tmp_path, baits=("antigravity",))
    assert any(fault in found for found in oracle.judge(case).faults)


def test_a_hang_and_a_death_cost_the_worker_and_not_the_next_case(oracle: Oracle, tmp_path: Path) -> None:
    import os
    import time

    hang, death = (Evil(time.sleep, 60), "took more than", 1), (Evil(os._exit, 3), "killed the process", 30)
    for deed, fault, seconds in (hang, death):
        model: Any = nn.Linear(2, 2)
        model.evil = deed
        torch.save(model, tmp_path / "m.pt")
        case = Case(("show", "m.pt", "--inputs", "2x2", "--trust-pickle"), tmp_path, seconds=seconds)
        assert any(fault in found for found in oracle.judge(case).faults)


def test_a_good_run_and_a_refusal_have_no_faults(oracle: Oracle, tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    good = oracle.judge(Case(("show", "m.pt", "--inputs", "2x2"), tmp_path))
    assert (good.code, good.faults) == (0, ())
    refused = oracle.judge(Case(("show", "none.pt"), tmp_path))
    assert (refused.code, refused.faults) == (2, ())
