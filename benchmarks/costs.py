"""What files, a capture without weights and the command line cost, each beside what it cannot do without, or is for.

    python benchmarks/costs.py [files | onnx | meta | start] [--rounds 3] [--layers 126] [--model gpt2 ...]

`files`: `save` and `load` of a program beside torch.save and torch.load of its model, every file a new one, and its size
over that of the parameters. `onnx`: `export_onnx` without its check beside `torch.onnx.export` of an export of the same
model that was made before, with the same free sizes. `meta`: a Llama of 405B parameters' sizes on the meta device, exported
by torch.export alone, captured, saved and read back. `start`: `rewrite --help` beside an empty Python, `rewrite passes`
beside `import torch`.
CPU seconds, one thread: medians of the rounds, or the best of two for `meta`. `save` makes digests beside writing: by the
clock it takes less, where a core is free.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from applying import built

LLAMA_405B = {
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_attention_heads": 128,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "use_cache": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["files", "onnx", "meta", "start"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--model", nargs="+", default=["vit_base_patch16_224", "gpt2", "llama-300m"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}, one thread, "
        f"{time.strftime('%Y-%m-%d')}, {options.rounds} rounds\n"
    )
    if "start" in options.what:
        start(options.rounds)
    if "files" in options.what:
        files(options.model, options.rounds)
    if "onnx" in options.what:
        onnx(options.model, options.rounds)
    if "meta" in options.what:
        meta(options.layers)


def seconds(action: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, seconds by the clock, and the result."""
    began, clock = time.process_time(), time.perf_counter()
    result = action()
    return time.process_time() - began, time.perf_counter() - clock, result


def files(names: list[str], rounds: int) -> None:
    import rewrite

    ratios = "over | by the clock"
    print(f"| model | torch.save | save | {ratios} | torch.load | load | {ratios} | file over parameters |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in names:
        model, inputs = built(name)
        program = rewrite.capture(model, inputs)
        size = sum(p.nbytes for p in model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            plain, own = Path(folder) / "model.pt", Path(folder) / "model.pt2"
            actions: tuple[Callable[[], Any], ...] = (
                lambda: torch.save(model, plain),  # noqa: B023
                lambda: rewrite.save(program, own),  # noqa: B023
                lambda: torch.load(plain, weights_only=False),  # noqa: B023
                lambda: rewrite.load(own),  # noqa: B023
            )
            save, ours, load, again = medians(actions, rounds, folder)
            over = own.stat().st_size / size
        print(
            f"| {name}, {size / 2**20:.0f} MiB {compared(save, ours)} {compared(load, again)} | {over:.4f} |",
            flush=True,
        )


def compared(theirs: tuple[float, float], ours: tuple[float, float]) -> str:
    """Cells: CPU seconds of both, how many times they are, and how many times by the clock."""
    return f"| {theirs[0]:.2f} | {ours[0]:.2f} | {ours[0] / theirs[0]:.1f} | {ours[1] / theirs[1]:.1f}"


def medians(actions: Sequence[Callable[[], Any]], rounds: int, folder: str) -> list[tuple[float, float]]:
    """The CPU seconds of each action and those by the clock, in rounds over all of them; every file is a new one.

    The first round is left out: what runs for the first time is slow.
    """
    found = []
    for _ in range(rounds + 1):
        for file in Path(folder).iterdir():
            file.unlink()
        found.append([seconds(action)[:2] for action in actions])
    columns = zip(*found[1:], strict=True)
    return [(statistics.median(cpu for cpu, _ in c), statistics.median(clock for _, clock in c)) for c in columns]


def onnx(names: list[str], rounds: int) -> None:
    import rewrite
    from rewrite.backends.onnx.convert import OPSET, quiet

    print("\n| model | torch.onnx.export | export_onnx | over | by the clock |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        model, inputs = built(name)
        program = rewrite.capture(model, inputs)
        shapes = tuple(dict.fromkeys(range(1 if t.is_floating_point() else 2), torch.export.Dim.AUTO) for t in inputs)
        exported = torch.export.export(model.eval(), inputs, dynamic_shapes=shapes, strict=False)
        with tempfile.TemporaryDirectory() as folder, quiet():
            place = Path(folder) / "model.onnx"
            actions: tuple[Callable[[], Any], ...] = (
                lambda: torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False).save(place),  # noqa: B023
                lambda: rewrite.export_onnx(program, place, check_values=False),  # noqa: B023
            )
            theirs, ours = medians(actions, rounds, folder)
        print(f"| {name} {compared(theirs, ours)} |", flush=True)


def meta(layers: int) -> None:
    import rewrite
    from rewrite.sources.compat import mend_torchvision

    mend_torchvision()
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        model = LlamaModel(LlamaConfig(num_hidden_layers=layers, **LLAMA_405B)).train()
    ids = torch.randint(100, (2, 16))
    shapes = torch.export.ShapesCollection()
    shapes[ids] = dict.fromkeys(range(2), torch.export.Dim.AUTO)

    def export() -> Any:
        return torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes=shapes, strict=False)

    def capture() -> Any:
        return rewrite.capture(model, (), {"input_ids": ids})

    count = sum(p.numel() for p in model.parameters()) / 1e9
    print(f"\nLlama of {layers} layers, {count:.0f}B parameters on the meta device")
    alone = min(seconds(export)[0] for _ in range(2))
    first, _, program = seconds(capture)
    taken = min(first, seconds(capture)[0])
    print(f"torch.export {alone:.1f} s, capture {taken:.1f} s: {taken / alone:.2f} times", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "model.pt2"
        saved, *_ = seconds(lambda: rewrite.save(program, place))
        loaded, *_ = seconds(lambda: rewrite.load(place))
        print(f"save {saved:.1f} s, load {loaded:.1f} s, {place.stat().st_size / 2**20:.1f} MiB", flush=True)


def start(rounds: int) -> None:
    commands = {
        "empty": ["-c", "pass"],
        "import torch": ["-c", "import torch"],
        "--help": ["-m", "rewrite", "--help"],
        "passes": ["-m", "rewrite", "passes"],
    }
    found: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(3 * rounds):
        for name, words in commands.items():
            found[name].append(child([sys.executable, *words]))
    middle = {name: statistics.median(times) for name, times in found.items()}
    print(
        f"an empty Python {middle['empty']:.3f} s, `rewrite --help` {middle['--help']:.3f} s "
        f"({middle['--help'] / middle['empty']:.1f} times); `import torch` {middle['import torch']:.2f} s, `rewrite passes` "
        f"{middle['passes']:.2f} s ({middle['passes'] / middle['import torch']:.2f} times)\n"
    )


def child(command: list[str]) -> float:
    """The CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
