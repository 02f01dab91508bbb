"""A pass with its proof on a model whose weights stay in their file: what the process must hold beside them.

    python benchmarks/streaming.py [--model llama-1b] [--step dyt] [--limit 3.0]

The model's state dict is saved; a process of its own maps it (`torch.load(..., mmap=True)`), captures the model,
applies and proves the pass (`share=True`). Pages of a mapped file can be given back at any time and are read again, so what
has to fit are the anonymous ones: their peak (`RssAnon` of /proc/self/status, every 20 ms) stands beside the model's size.
`--limit` GiB puts that process under such a limit of memory, file pages included (Linux, control groups v1, as root).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.applying import LANGUAGE, built  # noqa: E402

GROUP = Path("/sys/fs/cgroup/memory/rewrite-streaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-1b", choices=[*LANGUAGE])
    parser.add_argument("--step", default="dyt", help="the pass, as pipeline text")
    parser.add_argument("--limit", type=float, help="GiB of memory")
    parser.add_argument("--file", type=Path, help="the mapped weights: the process of its own")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.file:
        print(json.dumps(measured(options.model, options.step, options.file)))
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save(built(options.model)[0].state_dict(), file)
        command = [sys.executable, __file__, "--model", options.model, "--step", options.step, "--file", str(file)]
        with limited(options.limit) as enter:
            run = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, preexec_fn=enter)
    found = json.loads(run.stdout)
    size = found.pop("size")
    print(
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, one thread, {options.model}, {size / 2**30:.2f} GiB, ",
        end="",
    )
    print(f"{options.step}, memory limited to {options.limit or 'what there is'} GiB\n")
    print("| step | CPU seconds | peak of anonymous memory, GiB | over that before, in models |")
    print("| --- | --- | --- | --- |")
    for step, (seconds, peak, before) in found.items():
        print(f"| {step} | {seconds:.1f} | {peak / 2**30:.2f} | {(peak - before) / size:.2f} |")


@contextmanager
def limited(gigabytes: float | None) -> Iterator[Callable[[], None] | None]:
    """What a new process calls to enter a control group with so much memory."""
    if gigabytes is None:
        yield None
        return
    GROUP.mkdir(exist_ok=True)
    (GROUP / "memory.limit_in_bytes").write_text(str(int(gigabytes * 2**30)))
    try:
        yield lambda: (GROUP / "cgroup.procs").write_text(str(os.getpid())) and None
    finally:
        GROUP.rmdir()


def measured(name: str, step: str, file: Path) -> dict[str, Any]:
    """The model's bytes, and of each step its CPU seconds, its peak of anonymous memory, and what was held before."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    import rewrite

    with torch.device("meta"):
        model = built(name)[0]
    inputs = (torch.randint(1000, (2, 64)),)
    model.load_state_dict(torch.load(file, mmap=True), assign=True)
    mend_buffers(model)
    found: dict[str, Any] = {"size": sum(p.numel() * p.element_size() for p in model.parameters())}

    def watched(step: str, action: Callable[[], Any]) -> Any:
        before, began = anonymous(), time.process_time()
        with Peak() as peak:
            result = action()
        found[step] = (time.process_time() - began, peak.bytes, before)
        return result

    program = watched("capture", lambda: rewrite.capture(model, inputs))
    watched(f"apply {step}, proven", lambda: rewrite.apply(program, step, share=True))
    return found


def mend_buffers(model: torch.nn.Module) -> None:
    """Buffers that no state dict holds are computed by their modules' constructors: those of rotary embeddings again."""
    for path, module in model.named_modules():
        if any(b.is_meta for b in module.buffers(recurse=False)):
            parent = model.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], type(module)(model.config))


class Peak:
    """The most anonymous memory that this process holds meanwhile."""

    def __enter__(self) -> Peak:
        self.bytes, self._done = anonymous(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """The bytes of memory that are no pages of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
