"""Where results go: choosing the file, and writing it so that a failed run leaves what was there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rewrite.errors import RewriteError, did_you_mean, first_line

from .staging import FullDiskFile, Staging, check_folder_place, check_place, explained, is_folder_name, of_the_system

if TYPE_CHECKING:
    import torch
    from torch import nn

    from rewrite.graph.program import Program

MODULE_SUFFIXES = (".pt", ".pth")
SUFFIXES = (".pt", ".pt2", ".onnx", ".safetensors", ".pth")
FORMATS = (
    ".pt (your class again), .pt2 (an exported program), .onnx, .safetensors (the weights alone) or, without a suffix, "
    "a folder for the model's library"
)


@dataclass(frozen=True)
class Plan:
    """The file or folder to write; ``asked`` where the user named it, otherwise a `.pt2` may take the place of a `.pt`."""

    path: Path
    asked: bool


@dataclass(frozen=True)
class Written:
    """The file that a run wrote, what is in it, and why it is not the kind that was first choice."""

    path: Path
    kind: str
    reason: str = ""


def plan(spec: str, names: Sequence[str], output: Path | None, read: Iterable[Path] = ()) -> Plan:
    """The file for the result of the passes ``names`` on the model ``spec``: ``output``, or `model.NAMES.pt`.

    By default it lies beside a model's file, and in the current folder for a model that comes from elsewhere.

    Raises:
        RewriteError: its suffix is unknown, its folder is missing, it is one of the files to be ``read``, or it is to
            hold a class where the model has none.
    """
    path = output if output is not None else _default(spec, names)
    if output is not None and is_folder_name(output):
        check_folder_place(path)
        if _is_program(spec):
            raise RewriteError(f"cannot write {path}: {spec} holds a program, and not how its class is built; write a .pt2")
        return Plan(path, True)
    check_free(path, [Path(spec), *read])
    if path.suffix not in SUFFIXES:
        near = did_you_mean(path.suffix, SUFFIXES)
        raise RewriteError(f"cannot write {path}: unknown suffix {path.suffix}{near or f'; give {FORMATS}'}")
    if path.suffix in MODULE_SUFFIXES and _is_program(spec):
        raise RewriteError(
            f"cannot write {path}: {spec} holds a program and no class to give back; "
            f"write {path.with_suffix('.pt2')}, or start from the model itself"
        )
    return Plan(path, output is not None)


def check_free(path: Path, read: Iterable[Path]) -> None:
    """Raises RewriteError unless ``path`` can be a file in a folder that is there, and is none of those ``read``."""
    check_place(path)
    for other in read:
        if _same_file(path, other):
            raise RewriteError(f"cannot write {path}: it is an input of this run; choose another name")


def _same_file(path: Path, other: Path) -> bool:
    try:
        return path.samefile(other)
    except OSError:
        return False


def _is_program(spec: str) -> bool:
    return Path(spec).suffix == ".pt2"


def _default(spec: str, names: Sequence[str]) -> Path:
    path, tail = Path(spec), ".".join(names)
    scheme, colon, name = spec.partition(":")
    if scheme == "hf" and colon:
        path = Path(name)
    if path.is_dir():
        return Path(f"{path.resolve().name}.{tail}.pt")
    if path.suffix in SUFFIXES or path.is_file() or not colon:
        suffix = path.suffix if path.suffix in (*MODULE_SUFFIXES, ".pt2") else ".pt"
        return path.with_name(f"{path.stem}.{tail}{suffix}")
    stem = name if scheme == "timm" else name.rpartition(".")[2]
    return Path(f"{stem.replace('/', '-').replace(':', '-')}.{tail}.pt")


def write(program: Program, model: nn.Module | None, plan: Plan, staging: Staging) -> Written:
    """Stage the program in the format of the plan's suffix; ``model`` is what it was captured from.

    Raises RewriteError when the format cannot hold it. A module that cannot be made becomes a `.pt2`, with the
    reason, unless the user asked for the module.
    """
    path = plan.path
    if is_folder_name(path):
        from .store import write_folder

        return Written(*write_folder(program, path, staging))
    with explained(path):
        if path.suffix not in MODULE_SUFFIXES:
            return _WRITERS[path.suffix](program, path, staging)
        place = staging.path(path)  # where there is no room to write, another format would have none either
        try:
            return _write_module(program, model, path, place)
        except RewriteError as error:
            if plan.asked:
                raise RewriteError(f"{error}; write a .pt2 instead: -o {path.with_suffix('.pt2')}") from None
            staging.drop(path)
            return _write_program(program, path.with_suffix(".pt2"), staging, str(error))


def _write_module(program: Program, model: nn.Module | None, path: Path, place: Path) -> Written:
    import torch

    from rewrite.lowering.graft import graft

    if model is None:
        raise RewriteError("the model is a program and has no class to give back")
    grafted = graft(program, model)
    try:
        with FullDiskFile(place) as file:
            torch.save(grafted, file)  # type: ignore[arg-type]  # it takes whatever has a method `write`
    except OSError:
        raise
    except Exception as error:  # pickle has no error of its own: any class may raise anything
        raise RewriteError(f"a {type(grafted).__name__} cannot be pickled: {first_line(error)}") from None
    return Written(path, f"{type(grafted).__name__}, read it with torch.load(..., weights_only=False)")


def _write_program(program: Program, path: Path, staging: Staging, reason: str = "") -> Written:
    from .store import write_program

    write_program(program, staging.path(path), path.stem)
    return Written(path, "a program, read it with rewrite.load or torch.export.load", reason)


def _write_onnx(program: Program, path: Path, staging: Staging) -> Written:
    from rewrite.lowering.lower import export_onnx

    export_onnx(program, staging.path(path))
    return Written(path, "an ONNX model")


def _write_weights(program: Program, path: Path, staging: Staging) -> Written:
    from safetensors.torch import save_file

    tensors, tied = _separate(program.module.state_dict())
    with of_the_system():
        save_file(tensors, staging.path(path), metadata={"format": "pt", **tied})
    shared = f", {len(tied)} tied names left to their partners" if tied else ""
    return Written(path, f"{len(tensors)} tensors{shared}")


def _separate(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors without memory in common, and for each name that is tied to an earlier one, that name."""
    first: dict[Any, str] = {}
    tensors, tied = {}, {}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise RewriteError(f"{name} is on the meta device and has no values to write")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        kept = first.setdefault(place, name) if tensor.numel() else name
        if kept != name:
            tied[name] = kept
        elif tensor.untyped_storage().nbytes() == tensor.nbytes:
            tensors[name] = tensor.detach().contiguous()
        else:
            tensors[name] = tensor.detach().contiguous().clone()  # a part of a larger memory, which others may share
    return tensors, tied


_WRITERS = {".pt2": _write_program, ".onnx": _write_onnx, ".safetensors": _write_weights}
