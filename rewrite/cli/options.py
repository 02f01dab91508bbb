"""What the commands take, each said once."""

from pathlib import Path
from typing import Annotated

import typer

from rewrite.errors import RewriteError

MODEL_HELP = "A .pt or .pt2 file, a transformers folder, timm:NAME, hf:FOLDER or package.module:factory."


def complete_pass(incomplete: str) -> list[str]:
    """The names of passes that begin so: for the shell, which asks at each tab."""
    from rewrite.pipeline.registry import pass_names

    try:
        return [name for name in pass_names() if name.startswith(incomplete)]
    except RewriteError:
        return []


ModelName = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Passes = Annotated[
    list[str] | None,
    typer.Option(
        "--pass",
        "-p",
        metavar="TEXT",
        show_default=False,
        help="A pass, such as dyt{alpha=0.8}; repeat for several.",
        autocompletion=complete_pass,
    ),
]
Pipeline = Annotated[
    str, typer.Option(metavar="TEXT", show_default=False, help="All passes in one text, separated by commas.")
]
Inputs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SPEC",
        show_default=False,
        help="Example inputs: 2x3x224x224, input_ids=int64[2,16;0..100], or a .pt file; inferred where the model tells.",
    ),
]
Weights = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A state_dict or .safetensors to load first.", show_default=False)
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        show_default=False,
        help="Samples for passes that ask for data: .npz, .pt, .safetensors, or a folder.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="N", min=0, max=2**63 - 1, help="Seeds inputs, random weights and the proof.")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not prove what the passes promise.")]
TrustPickle = Annotated[bool, typer.Option("--trust-pickle", help="Run whatever code a pickle or folder holds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Rate = Annotated[float, typer.Option("--lr", metavar="X", help="The largest learning rate of healing.")]
Loss = Annotated[
    str, typer.Option(metavar="KIND", help="What healing goes by: kl or mse of the outputs; auto: kl for logits.")
]
CheckpointFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", show_default=False, help="Where healing stands is written there, and gone on from; gone at the end."
    ),
]
