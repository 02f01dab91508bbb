"""A broken promise: the error and the bundle that lets it be looked at."""

from __future__ import annotations

import itertools
import json
import platform
import time
from pathlib import Path

import torch

from rewrite.errors import RewriteError
from rewrite.graph.history import Verification
from rewrite.graph.program import Program

from .pass_ import Pass
from .settings import Settings


class VerificationError(RewriteError):
    """A pass broke its word. ``bundle`` is the folder that holds what is needed to look into it."""

    bundle: Path | None = None

    @classmethod
    def of(
        cls, before: Program, after: Program, step: Pass, verification: Verification, settings: Settings
    ) -> VerificationError:
        """The error for a failed verification, with its crash bundle written below the folder of the settings."""
        worst = verification.failures[0]
        bundle = write_crash_bundle(before, after, step, verification, settings.crash_folder)
        where = f"; see {bundle}" if bundle else ""
        made = cls(f"pass {step.text} broke its contract ({step.contract()}): {worst.name}: {worst.detail}{where}")
        made.bundle = bundle
        return made


_bundles = itertools.count()


def write_crash_bundle(before: Program, after: Program, step: Pass, verification: Verification, folder: Path) -> Path | None:
    """Write pipeline text, both graphs, the checks, seeds and versions to a new folder; None if it cannot be made."""
    path = folder / f"crash-{step.name}-{time.strftime('%Y%m%d-%H%M%S')}-{next(_bundles)}"
    history = ",".join([*(r.text for r in before.history), step.text])
    facts = {
        "pipeline": history,
        "pass": step.text,
        "seed": verification.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "model": before.origin.model_class,
        "checks": [
            {"name": c.name, "passed": c.passed, "detail": c.detail, "error": str(c.error)} for c in verification.checks
        ],
    }
    try:
        path.mkdir(parents=True)
        (path / "pipeline.txt").write_text(history + "\n")
        (path / "before.py").write_text(before.module.code)
        (path / "after.py").write_text(after.module.code)
        (path / "bundle.json").write_text(json.dumps(facts, indent=2))
    except OSError:
        return None
    return path
