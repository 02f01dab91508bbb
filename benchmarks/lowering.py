"""Time a model in each lowering, as it is and after a pass, against the model itself in eager PyTorch.

    python benchmarks/lowering.py [--model vit_tiny_patch16_224] [--pass dyt] [--batch 8] [--device cpu|cuda]

All are timed in one process, in rounds: each round calls every candidate once, in an order drawn anew, so that a drift
of the machine's speed meets all alike. The table holds medians in milliseconds, the range of the middle half, the ratio
of the model's median to each, and the largest relative difference of the outputs from eager's.
"""

from __future__ import annotations

import argparse
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import rewrite
from rewrite.graph.program import Program
from rewrite.numerics.compare import relative_error

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.models.zoo import Case, timm_case, transformers_case

LOWERINGS = ("eager", "inductor", "onnxruntime")
WARM_UP = 3


@dataclass
class Candidate:
    """Something to time: its name, how it is called, what it cost to make, and how far it is from its reference."""

    name: str
    run: Callable[..., Any]
    preparation: float
    error: float
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Median time of a call in seconds."""
        return statistics.median(self.seconds)

    def row(self, baseline: Candidate) -> str:
        """One line of the table."""
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (
            f"{self.name:<24}{1e3 * self.median:>10.2f}{1e3 * low:>10.2f} .. {1e3 * high:<8.2f}"
            f"{baseline.median / self.median:>6.2f}x{self.preparation:>10.1f}{self.error:>12.1e}"
        )


def of_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Candidate:
    """The user's own model in evaluation: what the others are compared with."""
    evaluated = model.eval()

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return evaluated(*args, **kwargs)

    for _ in range(WARM_UP):
        run(*args, **kwargs)
    return Candidate("the model itself", run, 0.0, 0.0)


def lowered(name: str, program: Program, lowering: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Candidate:
    """A lowering of a program, warmed up; preparation includes its first call."""
    began = time.perf_counter()
    options = {"dynamic": False} if lowering == "inductor" else {}
    run = rewrite.lower(program, lowering, **options)
    found = run(*args, **kwargs)
    synchronize()
    preparation = time.perf_counter() - began
    expected = rewrite.lower(program)(*args, **kwargs)
    pairs = zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True)
    error = max(relative_error(a, b) for a, b in pairs if isinstance(a, Tensor))
    for _ in range(WARM_UP):
        run(*args, **kwargs)
    where = f" ({run.providers[0].removesuffix('ExecutionProvider')})" if lowering == "onnxruntime" else ""
    return Candidate(f"{name}{lowering}{where}", run, preparation, error)


def measure(candidates: list[Candidate], args: tuple[Any, ...], kwargs: dict[str, Any], rounds: int) -> None:
    """Call every candidate once in each round and note its time."""
    order = random.Random(0)
    for _ in range(rounds):
        for candidate in order.sample(candidates, len(candidates)):
            synchronize()
            began = time.perf_counter()
            candidate.run(*args, **kwargs)
            synchronize()
            candidate.seconds.append(time.perf_counter() - began)


def synchronize() -> None:
    """Wait for CUDA, where there is any."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def environment(device: str) -> str:
    """What this ran on."""
    import onnxruntime

    on = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device == "cuda":
        on = torch.cuda.get_device_name()
    return (
        f"{on}; Python {platform.python_version()}, PyTorch {torch.__version__}, "
        f"ONNX Runtime {onnxruntime.__version__}, rewrite {rewrite.__version__}"
    )


def case_of(name: str) -> Case:
    """A timm model by name, or a small transformers type as ``hf:TYPE``."""
    return transformers_case(name.removeprefix("hf:")) if name.startswith("hf:") else timm_case(name, 224)


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm name, or hf:TYPE for a small one")
    parser.add_argument("--pass", dest="passes", default="dyt", help="a pipeline")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32, help="tokens, for models that have them")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--lowering", action="append", choices=LOWERINGS, help="may repeat; by default all")
    options = parser.parse_args()
    case = case_of(options.model)
    model = case.build().to(options.device)
    inputs = case.inputs(options.batch, options.length)
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(options.device), inputs)
    program = rewrite.capture(model, args, kwargs)
    converted = rewrite.apply(program, options.passes, verify=False)
    candidates = [of_model(model, args, kwargs)]
    for name, each in (("", program), (f"{options.passes} ", converted)):
        candidates += [lowered(name, each, lowering, args, kwargs) for lowering in options.lowering or LOWERINGS]
    measure(candidates, args, kwargs, options.rounds)
    print(f"{options.model}, batch {options.batch}, {options.rounds} rounds, on {environment(options.device)}\n")
    print(f"{'':<24}{'median ms':>10}{'middle half':>18}{'ratio':>11}{'made in s':>10}{'difference':>12}")
    print("\n".join(candidate.row(candidates[0]) for candidate in candidates))


if __name__ == "__main__":
    main()
