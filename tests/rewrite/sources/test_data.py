"""Data in every form that is taken, as calls of a model; files that are no data, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from rewrite import RewriteError
from rewrite.sources import data_files
from rewrite.sources.data import Call, Data, fitted

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)

ITEMS: dict[str, tuple[Any, Call]] = {
    "a tensor": (X, Call((X,), {})),
    "an array": (X.numpy(), Call((X,), {})),
    "positional": ((X, Y), Call((X, Y), {})),
    "by name": ({"x": X}, Call((), {"x": X}, spare=True)),
    "the pair": (((X,), {"y": Y}), Call((X,), {"y": Y})),
    "a batch": ([X, Y], Call((X, Y), {}, spare=True)),
}


def same(found: Call, expected: Call) -> bool:
    def flat(call: Call) -> list[Any]:
        return [*call.args, *call.kwargs.values()]

    pairs = zip(flat(found), flat(expected), strict=True)
    return found.kwargs.keys() == expected.kwargs.keys() and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ITEMS)
def test_items(name: str) -> None:
    item, expected = ITEMS[name]
    data = Data.of([item, item])
    for _ in range(2):
        first, second = data
        assert same(first, expected)
        assert same(second, expected)
        assert first.spare == expected.spare
    assert data.count() == 2


def test_a_generator_can_be_gone_through_again() -> None:
    data = Data.of(X + i for i in range(3))
    assert [len(list(data)), len(list(data))] == [3, 3]


@pytest.mark.parametrize("bad", [[3], ["text"], [{1: X}]], ids=str)
def test_items_that_are_no_arguments(bad: Any) -> None:
    with pytest.raises(RewriteError, match="item 0 of the data is a"):
        list(Data.of(bad))


def test_what_is_no_data() -> None:
    with pytest.raises(RewriteError, match="data is an iterable, a file or a folder of files, not a int"):
        Data.of(3)


def test_a_data_loader_gives_its_batches_in_the_same_order_under_one_seed() -> None:
    data = Data.of(DataLoader(TensorDataset(torch.arange(8.0), torch.arange(8)), batch_size=3, shuffle=True))
    assert data.count() == 3
    assert data.sha256 == Data.of(data.source).sha256
    state = torch.get_rng_state()
    assert data.sha256
    assert torch.equal(state, torch.get_rng_state())


def test_a_data_loader_without_a_length() -> None:
    class Stream(IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(torch.arange(4.0))

    data = Data.of(DataLoader(Stream(), batch_size=2))
    assert data.count() is None
    assert [call.args[0].tolist() for call in data] == [[0, 1], [2, 3]]


LONG = torch.randn(70, 2, generator=torch.Generator().manual_seed(0))


def files(folder: Path) -> dict[str, Path]:
    made = {name: folder / f"d.{name}" for name in ("npz", "pt", "safetensors")}
    numpy.savez(made["npz"], x=LONG.numpy())
    torch.save({"x": LONG}, made["pt"])
    safetensors.torch.save_file({"x": LONG}, made["safetensors"])
    return made


@pytest.mark.parametrize("kind", ["npz", "pt", "safetensors"])
def test_a_file_of_all_samples_is_cut_into_batches(kind: str, tmp_path: Path) -> None:
    data = Data.of(str(files(tmp_path)[kind]))
    assert [call.kwargs["x"].shape[0] for call in data] == [32, 32, 6]
    assert torch.equal(torch.cat([call.kwargs["x"] for call in data]), LONG)
    assert [call.kwargs["x"].shape[0] for call in data.calls(40)] == [40, 30]
    assert len(data.sha256) == 64


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    files(tmp_path)
    (tmp_path / "notes.txt").write_text("no data")
    data = Data.of(tmp_path)
    assert [path.name for path in data.files] == ["d.npz", "d.pt", "d.safetensors"]
    assert len(list(data)) == 9


def test_a_list_in_a_file_is_a_list_of_items(tmp_path: Path) -> None:
    torch.save([X, (X, Y)], tmp_path / "d.pt")
    assert [len(call.args) for call in Data.of(tmp_path / "d.pt")] == [1, 2]


def test_sizes_that_differ_are_not_cut(tmp_path: Path) -> None:
    (call,) = Data.of({"x": LONG, "scale": torch.ones(1)})
    assert call.kwargs["x"] is LONG


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "there is no file"),
        (lambda p: p.mkdir(), "there is no .npz, .pt, .pth, .safetensors in the folder"),
        (lambda p: p.write_bytes(b"no zip"), "cannot read"),
        (lambda p: torch.save(DataLoader(TensorDataset(X)), p), "cannot read"),
    ],
)
def test_files_that_are_none(make: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "d.pt"
    make(path)
    with pytest.raises(RewriteError, match=message):
        list(Data.of(path))


def test_an_array_of_objects_runs_nothing(tmp_path: Path) -> None:
    numpy.savez(tmp_path / "d.npz", x=numpy.array([print], dtype=object))
    with pytest.raises(RewriteError, match="cannot read"):
        list(Data.of(tmp_path / "d.npz"))


def test_a_file_that_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy.savez_compressed(tmp_path / "d.npz", x=numpy.zeros(1 << 16))
    monkeypatch.setattr(data_files, "LARGEST", 1 << 16)
    with pytest.raises(RewriteError, match="unpacks to"):
        list(Data.of(tmp_path / "d.npz"))


def test_a_text_file_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(RewriteError, match="is no file of data"):
        Data.of(tmp_path / "d.csv")


FITS: dict[str, tuple[Call, list[Tensor], dict[str, Tensor]]] = {
    "labels of a batch": (Call((X, Y), {}, spare=True), [X], {}),
    "labels by name": (Call((), {"x": X, "labels": Y}, spare=True), [], {"x": X}),
    "no name known": (Call((), {"arr_0": X, "arr_1": Y}, spare=True), [X], {}),
    "all that is given": (Call((X, Y), {}), [X, Y], {}),
}


@pytest.mark.parametrize("name", FITS)
def test_what_a_model_takes(name: str) -> None:
    call, args, kwargs = FITS[name]
    assert same(fitted(call, ["x"]), Call(tuple(args), kwargs))
