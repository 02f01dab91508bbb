"""Who made what autograd keeps is told by the storage, not by where it lay."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rewrite.training.inventory import _Taker
from rewrite.training.packer import Storages
from tests.captures import shared


def test_what_takes_a_place_in_memory_that_came_free_has_another_maker() -> None:
    module = shared("bert").module
    taker, made = _Taker(module, Storages.of(module, [])), torch.randn(8)
    storage = made.untyped_storage()
    address = storage.data_ptr()
    taker.makers[address] = (StorageWeakRef(storage), "norm")
    assert taker._maker(address) == "norm"
    del made, storage
    assert taker._maker(address) == ""
