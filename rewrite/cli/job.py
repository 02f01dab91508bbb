"""One run of the command line, from the name of a model to the file written, and its report as JSON."""

from __future__ import annotations

import json
import math
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite import __version__
from rewrite.errors import RewriteError, did_you_mean, named_line
from rewrite.files.staging import Staging, explained
from rewrite.files.writers import Plan, Written, check_free, plan, write
from rewrite.pipeline.text import parse
from rewrite.sources.paths import is_there

if TYPE_CHECKING:
    from torch import nn

    from rewrite.graph.history import Record, Verification
    from rewrite.graph.program import Program
    from rewrite.pipeline.settings import Listener
    from rewrite.sources.data import Data

    from .curing import Cure

FILES = (".pt", ".pth", ".bin", ".pt2", ".safetensors")
_LIBRARIES = ("torch", "timm", "transformers", "onnx")


@dataclass(frozen=True)
class Model:
    """What to work on: its name, and what is needed to read and capture it."""

    spec: str
    inputs: tuple[str, ...] = ()
    weights: Path | None = None
    trust: bool = False
    seed: int = 0

    @property
    def is_program(self) -> bool:
        """Whether it is a `.pt2`, which is no module and carries its own weights and example inputs."""
        return Path(self.spec).suffix == ".pt2"

    def check(self) -> None:
        """Raises RewriteError for options that do not go together, and files that are not there."""
        for given, flag in ((self.inputs, "--inputs"), (self.weights, "--weights")):
            if self.is_program and given:
                raise RewriteError(f"{flag} does not go with {self.spec}: a .pt2 carries its own")
        for path in (Path(self.spec), self.weights):
            if path is not None and path.suffix in FILES and not is_there(path):
                raise RewriteError(f"there is no file {path}")

    def read(self, listener: Listener, data: Data | None = None) -> tuple[Program, nn.Module | None]:
        """The program, and the module that it was captured from: None for a `.pt2`.

        Without --inputs they are inferred, for what the ``data`` has where there is some.

        Raises RewriteError when the model cannot be read or captured.
        """
        self.check()
        listener(f"reading {self.spec}")
        if self.is_program:
            from rewrite.files.store import load

            return load(Path(self.spec)), None
        import torch

        from rewrite.frontend.capturable import check_capturable
        from rewrite.frontend.capture import capture
        from rewrite.sources.inputs import parse_inputs, unlike
        from rewrite.sources.models import read_model
        from rewrite.sources.sampled import inputs_for

        torch.manual_seed(self.seed)  # what is built here has random weights
        model = read_model(self.spec, weights=self.weights, trust=self.trust).model
        check_capturable(model)
        if self.inputs:
            args, kwargs = parse_inputs(self.inputs, seed=self.seed, model=model)
        else:
            args, kwargs = inputs_for(model, data, seed=self.seed)
        listener(f"capturing {type(model).__name__}{' with ' if kwargs else ''}{', '.join(kwargs)}")
        hint = unlike(model, args, kwargs)
        try:
            program = capture(model, args, kwargs)
        except RewriteError as error:
            raise RewriteError(f"{error}{hint}") from error
        if self.inputs and hint:  # a capture does not compute, and some operators only then look at the dtype
            _check_runs(program, hint)
        return program, model


@dataclass(frozen=True)
class Job:
    """A model, the passes to run on it as texts of one or more elements, and where the result and report go."""

    model: Model
    passes: tuple[str, ...]
    output: Path | None = None
    data: Path | None = None
    verify: bool = True
    dry_run: bool = False
    report: Path | None = None
    always: bool = False
    """Whether the model is written also when no pass changed it: to export it is to ask for the file."""
    cure: Cure | None = None

    def run(self, listener: Listener) -> Outcome:
        """Do it all, and tell the listener each step.

        The files are written together at the end, or, after any failure, not at all.

        Raises RewriteError for whatever the user can mend. Names and texts are checked before any work begins.
        """
        began = time.perf_counter()
        target = self.plan()
        listener("reading the passes")
        from rewrite.pipeline.registry import as_passes

        chain = as_passes(self.passes)
        data = read_data(self.data)
        healing = None if self.cure is None else self.cure.samples()
        program, model = self.model.read(listener, healing if data is None else data)
        from rewrite.pipeline.run import apply

        earlier = len(program.history)
        with _blamed(program):
            result = apply(program, chain, seed=self.model.seed, verify=self.verify, data=data, listener=listener)
        if self.cure is not None:
            result = self.cure.healed(result, program, earlier, self.model.seed, listener)
        changed = self.always or any(record.changes for record in result.history[earlier:])
        with Staging() as reports, Staging(rehearsal=self.dry_run) as staging:
            written = None
            if changed:
                listener(f"writing {target.path}")
                with _blamed(program):
                    written = write(result, model, target, staging)
            outcome = Outcome(
                self,
                program,
                result,
                earlier,
                data.sha256 if data is not None else None,
                time.perf_counter() - began,
                written,
            )
            if self.report is not None:
                with explained(self.report):
                    reports.path(self.report).write_text(outcome.to_json(), encoding="utf-8")
        if self.cure is not None:
            self.cure.end()
        return outcome

    def plan(self) -> Plan:
        """Where the result goes, once everything that can be checked before any work is in order."""
        self.model.check()
        names = [element.name for text in self.passes for element in parse(text)]
        read = [path for path in (self.model.weights, self.data, *map(Path, self.model.inputs)) if path]
        if self.cure is not None:
            self.cure.check()
            names, read = [*names, "heal"], [*read, *self.cure.files]
        target = plan(self.model.spec, names, self.output, read)
        if self.report is not None:
            check_free(self.report, [Path(self.model.spec), *read])
            if self.report.absolute() == target.path.absolute():
                raise RewriteError(f"--report and --output are both {self.report}")
        return target


def parameter_count(program: Program) -> int:
    """How many numbers the program's parameters hold, tied ones once."""
    return sum(parameter.numel() for parameter in program.module.parameters())


def versions() -> dict[str, str]:
    """The versions of this package, Python, and the libraries that were imported."""
    loaded = {name: sys.modules.get(name) for name in _LIBRARIES}
    libraries = {name: str(getattr(module, "__version__", "")) for name, module in loaded.items() if module}
    return {"rewrite": __version__, "python": platform.python_version(), **libraries}


@dataclass(frozen=True)
class Outcome:
    """What a job did: the program before and after, what was written where, or would be without `--dry-run`.

    ``written`` is None where no pass changed anything, and so there was nothing to write.
    """

    job: Job
    before: Program
    program: Program
    earlier: int
    data_sha256: str | None
    seconds: float
    written: Written | None
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def records(self) -> tuple[Record, ...]:
        """What the passes of this job did; the program's history may begin before it."""
        return self.program.history[self.earlier :]

    def to_json(self) -> str:
        """The report: where everything came from, what capture saw, a record for each pass, where the result is."""
        model, origin = self.job.model, self.program.origin
        capture = {
            "seconds": dict(origin.seconds),
            "dimensions": [asdict(dimension) for dimension in self.program.dimensions],
            "opaque": [asdict(part) for part in self.program.opaque],
            "notes": list(origin.notes),
        }
        report = {
            "versions": self.versions,
            "model": {
                "spec": model.spec,
                "class": origin.model_class,
                "weights": _text(model.weights),
                "inputs": list(model.inputs),
                "parameters": parameter_count(self.before),
            },
            "pipeline": ",".join(record.text for record in self.records),
            "seed": model.seed,
            "data": None if self.job.data is None else {"path": str(self.job.data), "sha256": self.data_sha256},
            "capture": capture,
            "earlier": [record.to_json() for record in self.program.history[: self.earlier]],
            "passes": [record.to_json() for record in self.records],
            "output": None if self.job.dry_run or self.written is None else _output(self.written),
            "seconds": self.seconds,
        }
        return json.dumps(_finite(report), indent=2, allow_nan=False) + "\n"


@contextmanager
def _blamed(program: Program) -> Iterator[None]:
    """A failure that the model itself has on its example inputs is told as such: neither passes nor engine have a part."""
    try:
        yield
    except RewriteError:
        raise
    except Exception:
        from rewrite.sources.inputs import unlike

        trouble = _trouble(program)
        if trouble is None:
            raise
        hint = unlike(program.module, program.example_args, program.example_kwargs)
        raise RewriteError(f"the model does not run on its example inputs: {named_line(trouble)}{hint}") from trouble


def _check_runs(program: Program, hint: str) -> None:
    """Raises RewriteError where the program, in evaluation, does not run on its example inputs."""
    from rewrite.numerics.probes import watch

    try:
        watch(program, {}, program.example_args, program.example_kwargs, 0)
    except Exception as error:
        raise RewriteError(f"the model does not run on its example inputs: {named_line(error)}{hint}") from error


def _trouble(program: Program) -> Exception | None:
    """What the program raises when it is called with its example inputs, before any pass."""
    try:
        program.module(*program.example_args, **program.example_kwargs)
    except Exception as error:
        return error
    return None


def _output(written: Written) -> dict[str, str]:
    return {"path": str(written.path), "kind": written.kind, "reason": written.reason}


def read_data(path: Path | None) -> Data | None:
    """What `--data` names."""
    if path is None:
        return None
    from rewrite.sources.data import Data

    try:
        return Data.of(path)
    except RewriteError as error:
        raise RewriteError(f"--data: {error}") from None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _finite(value: Any) -> Any:
    """The value with "inf" and "nan" as text: JSON has no such numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


def compared(first: Model, second: Model, promise: str, bound: float | None, listener: Listener) -> Verification:
    """Two models held to a kind of promise: same, forward, or close.

    Raises RewriteError for another kind, and where a model cannot be read or captured.
    """
    from rewrite.proof.between import prove
    from rewrite.proof.contract import CLOSE, NEW, SAME, Contract

    kinds = {"same": (SAME, SAME), "forward": (SAME, NEW), "close": (CLOSE, NEW)}
    if promise not in kinds:
        raise RewriteError(f"--promise is one of {', '.join(kinds)}, not {promise!r}{did_you_mean(promise, kinds)}")
    contract = Contract(*kinds[promise], bound=bound)
    (before, _), (after, _) = first.read(listener), second.read(listener)
    listener("proving")
    return prove(before, after, contract=contract, seed=first.seed)
