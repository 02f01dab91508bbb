"""The ways to name a model: a file, a folder, `timm:NAME`, `hf:FOLDER`, `package.module:factory`."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewrite.errors import RewriteError, did_you_mean, first_line, named_line

from .bounds import bounded_by, check_folder
from .compat import import_mended, mended, why_import_fails
from .noted import WEIGHTS, built, is_noted, read_note
from .paths import is_folder, is_there, refuse_compressed, refuse_special
from .pickles import current_folder_importable, load_module
from .soundness import check_sound

FORMS = "a .pt or .pt2 file, a transformers folder, timm:NAME, hf:FOLDER or package.module:factory"
_FACTORY = re.compile(r"([^\W\d]\w*(?:\.\w+)*):([^\W\d]\w*(?:\.\w+)*)")
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Source:
    """A model and where it came from. `kind` is `module` (a pickle), `folder`, `timm` or `factory`.

    `path` is the file or folder of the model, None where it was built.
    """

    model: nn.Module
    spec: str
    path: Path | None
    kind: str


def read_model(spec: str, *, weights: Path | None = None, trust: bool = False) -> Source:
    """Build or load the model that `spec` names, on the CPU.

    Args:
        spec: a file holding a whole module, a folder with `config.json` (or `rewrite.json`) and weights (also `hf:FOLDER`),
            `timm:NAME` (random weights), or `package.module:factory`, called without arguments; the current folder
            is importable for the last.
        weights: a state_dict, saved by torch or as safetensors, that must fit the model exactly.
        trust: run the code of a pickle, of a class that a `rewrite.json` names, or that of a transformers folder.

    Raises:
        RewriteError: the model cannot be had; one line says why. A `.pt2` is no module: see `rewrite.load`.
    """
    source = _read(spec, trust)
    if weights is not None:
        load_weights(source.model, weights)
    return source


def _read(spec: str, trust: bool) -> Source:
    scheme, _, name = spec.partition(":")
    path = Path(spec)
    if scheme == "timm":
        return Source(_create_timm(name), spec, None, "timm")
    if scheme == "hf":
        return Source(_load_folder(Path(name), trust), spec, Path(name), "folder")
    if is_folder(path):
        return Source(_load_folder(path, trust), spec, path, "folder")
    if path.suffix == ".pt2":
        raise RewriteError(f"{spec} is an exported program, not a module: read it with rewrite.load")
    if path.suffix == ".safetensors":
        raise RewriteError(f"{spec} holds weights alone: name their model, timm:NAME or another, with --weights {spec}")
    if is_there(path) or path.suffix in {".pt", ".pth", ".bin"}:
        module = load_module(path, trust=trust)
        check_sound(path, module)
        return Source(module, spec, path, "module")
    factory = _FACTORY.fullmatch(spec)
    if factory is None:
        raise RewriteError(f"there is no model {spec!r}: give {FORMS}")
    return Source(_call_factory(spec, factory[1], factory[2]), spec, None, "factory")


# ---- libraries -----------------------------------------------------------------------------------------------


def _library(name: str) -> Any:
    try:
        return import_mended(name)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            raise RewriteError(f"{name} is not installed: pip install {name}") from None
        raise RewriteError(f"{name} cannot be imported: {why_import_fails(error)}") from None


def _create_timm(name: str, arguments: Mapping[str, Any] | None = None) -> nn.Module:
    timm = _library("timm")
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise RewriteError(f"timm has no model {name!r}{did_you_mean(architecture, timm.list_models())}")
    try:
        model: nn.Module = timm.create_model(name, pretrained=False, **(arguments or {}))
    except Exception as error:
        raise RewriteError(f"timm cannot build {name}: {first_line(error)}") from None
    return model


def _load_folder(folder: Path, trust: bool) -> nn.Module:
    if not is_folder(folder):
        raise RewriteError(f"there is no folder {folder}")
    if is_noted(folder):
        return _load_noted(folder, trust)
    if not (folder / "config.json").is_file():
        raise RewriteError(f"{folder} has no config.json: give {FORMS}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
        raise RewriteError(f"{folder} has a config.json but no safetensors")
    transformers = _library("transformers")
    with quiet(transformers):
        try:
            with bounded_by(check_folder(folder)):
                model, info = _from_pretrained(transformers, folder, trust)
        except RewriteError as error:
            raise RewriteError(f"cannot load {folder}: {error}") from None
        except Exception as error:
            raise RewriteError(f"cannot load {folder}: {first_line(error)}") from None
    gaps = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(key[0] for key in info["mismatched_keys"]),
    }
    if any(gaps.values()):
        raise RewriteError(f"the weights in {folder} do not fit {type(model).__name__}: {_listed(gaps)}")
    return model


def _load_noted(folder: Path, trust: bool) -> nn.Module:
    """The model of a folder with a `rewrite.json`, in the dtype of its weights."""
    noted = read_note(folder)
    if noted.timm:
        model = _create_timm(noted.timm, noted.arguments)
    elif not trust:
        raise RewriteError(
            f"{folder} names a class of your own, {noted.model}, whose code would run: allow it with --trust-pickle "
            f"(trust=True), or name a factory that builds it, with --weights {folder / WEIGHTS}"
        )
    else:
        with current_folder_importable():
            try:
                model = mended(lambda: built(noted))
            except RewriteError:
                raise
            except Exception as error:
                raise RewriteError(f"{noted.model} called as {folder} says raises {_located(error)}") from None
    floating = (t.dtype for t in _read_state_dict(folder / WEIGHTS).values() if t.is_floating_point())
    model.to(next(floating, torch.float32))
    load_weights(model, folder / WEIGHTS)
    return model


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """Without the bars and warnings of transformers.

    While transformers loads, ``torch.linspace`` is another function; torch lists its factories once, at the first use of a
    device as a context, and would never know the real one: so it is used here first.
    """
    with torch.device("meta"):
        torch.empty(0)
    bar = transformers.utils.logging.is_progress_bar_enabled()
    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(level)
        if bar:
            transformers.utils.logging.enable_progress_bar()


def _from_pretrained(transformers: Any, folder: Path, trust: bool) -> tuple[nn.Module, Mapping[str, Any]]:
    """The class is the one that config.json names, else the bare model of its type."""
    local = {"local_files_only": True, "trust_remote_code": trust}
    config = transformers.AutoConfig.from_pretrained(folder, **local)
    names = config.architectures or [""]
    builder = transformers.AutoModel
    if not (trust and getattr(config, "auto_map", None)):
        builder = getattr(transformers, names[0], builder)
    if builder is not transformers.AutoModel:
        del local["trust_remote_code"]
    loaded: tuple[nn.Module, Mapping[str, Any]] = builder.from_pretrained(
        folder, config=config, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True, **local
    )
    return loaded


# ---- factories -----------------------------------------------------------------------------------------------


def _call_factory(spec: str, module_name: str, attribute: str) -> nn.Module:
    with current_folder_importable():
        value: Any = _import_user_module(module_name)
        for part in attribute.split("."):
            if not hasattr(value, part):
                near = did_you_mean(part, [name for name in dir(value) if not name.startswith("_")])
                raise RewriteError(f"{module_name} has no {attribute!r}{near}")
            value = getattr(value, part)
        if isinstance(value, nn.Module):
            return value
        if not callable(value):
            raise RewriteError(f"{spec} is a {type(value).__name__}; a function that returns the model is needed")
        try:
            model = mended(value)
        except Exception as error:
            raise RewriteError(f"{spec} called without arguments raises {_located(error)}") from None
    if not isinstance(model, nn.Module):
        raise RewriteError(f"{spec} returns a {type(model).__name__}, not an nn.Module")
    return model


def _import_user_module(name: str) -> Any:
    try:
        return import_mended(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise RewriteError(f"there is no module {error.name}, neither installed nor in {Path.cwd()}") from None
        raise RewriteError(f"importing {name} raises {_located(error)}") from None
    except Exception as error:
        raise RewriteError(f"importing {name} raises {_located(error)}") from None


# ---- weights -------------------------------------------------------------------------------------------------


def load_weights(model: nn.Module, path: Path) -> None:
    """Copy the state_dict in `path` into the model.

    A checkpoint that keeps it under `state_dict`, `model_state_dict` or `model` is understood, and a name may be
    missing if a tensor tied to it is there.

    Raises:
        RewriteError: no file, no state_dict, or names and shapes other than the model's.
    """
    state = _read_state_dict(path)
    own = model.state_dict(keep_vars=True)
    shapes = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    fitting = {key: value for key, value in state.items() if key not in shapes}
    result = model.load_state_dict(fitting, strict=False)
    given = {id(own[key]) for key in own.keys() & state.keys()}
    missing = [key for key in result.missing_keys if key not in shapes and id(own.get(key)) not in given]
    wrong = {
        "missing": missing,
        "unexpected": result.unexpected_keys,
        "of another shape": [f"{k} {[*state[k].shape]} for {[*own[k].shape]}" for k in sorted(shapes)],
    }
    if any(wrong.values()):
        raise RewriteError(f"the weights in {path} do not fit {type(model).__name__}: {_listed(wrong)}")


def _read_state_dict(path: Path) -> Mapping[str, Tensor]:
    if not is_there(path):
        raise RewriteError(f"there is no weights file {path}")
    refuse_special(path)
    refuse_compressed(path)
    try:
        if path.suffix == ".safetensors":
            value = _library("safetensors.torch").load_file(path)
        else:
            value = torch.load(path, map_location="cpu", weights_only=True)
    except RewriteError:
        raise
    except Exception as error:
        reason = "it holds more than tensors" if "Weights only load failed" in str(error) else first_line(error)
        raise RewriteError(f"cannot read the weights in {path}: {reason}; save model.state_dict()") from None
    for key in _CHECKPOINT_KEYS:
        if isinstance(value, Mapping) and isinstance(value.get(key), Mapping):
            value = value[key]
    if not isinstance(value, Mapping) or not value or not all(isinstance(v, Tensor) for v in value.values()):
        raise RewriteError(f"{path} holds no state_dict: save model.state_dict()")
    return value


def _listed(groups: Mapping[str, Iterable[str]]) -> str:
    """`missing fc.weight, fc.bias; unexpected head.weight and 7 more`, at most three names of a group."""
    parts = []
    for title, group in groups.items():
        names = list(group)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            parts.append(f"{title} {', '.join(names[:3])}{more}")
    return "; ".join(parts)


def _located(error: BaseException) -> str:
    """The error on one line, with the place in the user's own code where it arose."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    ours = Path(last.filename).parent == Path(__file__).parent  # the call itself fails, and no code of the user ran
    return named_line(error) if ours else f"{named_line(error)} ({last.filename}:{last.lineno})"
