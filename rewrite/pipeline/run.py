"""Running passes over a program, one after the other, with a record and a proof of each."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.fx import Graph

from rewrite.frontend.capture import capture
from rewrite.graph.edit import Change, Editor
from rewrite.graph.history import Record, Site, Verification
from rewrite.graph.program import Program
from rewrite.numerics.compare import same_bytes
from rewrite.proof.prove import prove
from rewrite.torch_private import pytree

from .context import Context
from .crash import VerificationError
from .pass_ import Pass
from .registry import as_passes

PassSpec = str | Pass | Sequence[str | Pass]


class Listener(Protocol):
    """Told about each step of a pipeline as it begins: for progress displays."""

    def __call__(self, step: str) -> None: ...


def apply(
    model: Program | nn.Module,
    passes: PassSpec,
    args: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    verify: bool = True,
    share: bool = False,
    data: Any = None,
    crash_folder: Path | None = None,
    listener: Listener = lambda step: None,
) -> Program:
    """Run passes over a program (or a module, which is captured first); the result is a new Program.

    ``passes`` is pipeline text, a pass, or a list of both. Each pass is verified against its contract unless ``verify``
    is False. With ``share`` the result shares the tensors that no pass changed, otherwise it has its own.

    Raises RewriteError for bad text, options or selectors, and VerificationError (a RewriteError) when a pass breaks
    its word; the input is left as it was and a crash bundle is written below ``crash_folder`` (default: the current
    folder).
    """
    chain = as_passes(passes)
    if isinstance(model, Program):
        program = model
    else:
        listener(f"capturing {type(model).__name__}")
        program = capture(model, tuple(args or ()), kwargs)
    for step in chain:
        listener(f"running {step.text}")
        program = run_pass(
            program, step, seed=seed, share=share, data=data, verify=verify, listener=listener, crash_folder=crash_folder
        )
    return program if chain else program.clone(share=share)


def run_pass(
    program: Program,
    step: Pass,
    *,
    seed: int = 0,
    share: bool = False,
    data: Any = None,
    verify: bool = True,
    crash_folder: Path | None = None,
    listener: Listener = lambda step: None,
) -> Program:
    """One pass over a copy of ``program``, recorded and, if asked, verified."""
    began = time.perf_counter()
    result, context = rewritten(program, step, seed=seed, share=share, data=data)
    seconds = time.perf_counter() - began
    changed = _differs(program, result)
    if not changed:
        context.edit.changes.clear()
    verification: Verification | None = None
    if verify:
        listener(f"verifying {step.text}")
        verification = prove(program, result, context.edit.changes, step, seed, data=data, rerun=rewritten, changed=changed)
    record = Record(
        step.name,
        step.text,
        step.options(),
        seconds,
        _sites(context.edit.changes),
        tuple(context.skipped),
        tuple(context.warnings),
        str(step.contract()),
        (_count(program), _count(result)),
        verification,
        digest(data),
    )
    result = replace(result, history=(*program.history, record))
    if verification is not None and not verification.passed:
        raise VerificationError.of(program, result, step, verification, seed, crash_folder or Path.cwd())
    return result


def rewritten(program: Program, step: Pass, *, seed: int, share: bool = False, data: Any = None) -> tuple[Program, Context]:
    """A copy of ``program`` after a pass, and the context that the pass left."""
    result = program.clone(share=share)
    context = Context(Editor(result, step.text), seed, data)
    step.run(result, context)
    result.graph.lint()
    result.module.recompile()
    return result, context


def digest(data: Any) -> str | None:
    """The SHA-256 of data: of the bytes of its tensors and the text of everything else; None without data."""
    if data is None:
        return None
    made = hashlib.sha256()
    for leaf in pytree.tree_leaves(data):
        if isinstance(leaf, torch.Tensor):
            made.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
            if not leaf.is_meta:
                made.update(leaf.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(repr(leaf).encode())
    return made.hexdigest()


def _sites(changes: Sequence[Change]) -> tuple[Site, ...]:
    return tuple(Site(c.path or c.node, c.kind, c.detail) for c in changes)


def _count(program: Program) -> int:
    return sum(p.numel() for p in program.module.parameters())


def _differs(a: Program, b: Program) -> bool:
    """Whether a pass changed anything: the graph, a layer, a tensor."""
    return _outline(a.graph) != _outline(b.graph) or _layers(a) != _layers(b) or not _same_tensors(a, b)


def _outline(graph: Graph) -> list[Any]:
    return [(n.op, n.name, str(n.target), repr(n.args), repr(n.kwargs)) for n in graph.nodes]


def _layers(program: Program) -> dict[str, str]:
    return {path: f"{type(m).__name__} {m.extra_repr()}" for path, m in program.module.named_modules()}


def _same_tensors(a: Program, b: Program) -> bool:
    left, right = a.module.state_dict(), b.module.state_dict()
    return list(left) == list(right) and all(same_bytes(left[k], right[k]) for k in left)
