"""Pickles name classes by module. Those of the public classes name the package, and older pickles still load."""

import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from torch import nn

import syncnorm

DATA = Path(__file__).parent / "data" / "modules.pt"  # saved before 0.1.0, when each public class named its file
PUBLIC = [name for name in syncnorm.__all__ if isinstance(getattr(syncnorm, name), type)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_classes_are_named_by_the_package(name):
    assert getattr(syncnorm, name).__module__ == "syncnorm"


def modules_named_in(pickled):
    strings = [argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)]
    return {text.split(" ")[0] for text in strings if text.startswith("syncnorm")}


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickles_name_no_file_that_may_move(protocol):
    model = nn.ModuleList([syncnorm.SyncBatchNorm(3), syncnorm.LazySyncBatchNorm(), syncnorm.RMSNorm(3)])
    model.append(syncnorm.convert_sync_batchnorm(nn.BatchNorm2d(3)))
    named = modules_named_in(pickle.dumps(model, protocol))
    assert named <= {"syncnorm", "syncnorm.modules"}  # the second holds the reference to a process group


def test_older_pickles_load():
    saved = torch.load(DATA, weights_only=False)
    model = saved["model"].eval()
    kinds = [syncnorm.SyncBatchNorm, syncnorm.LazySyncBatchNorm, syncnorm.LayerNorm, syncnorm.RMSNorm]
    assert [type(model[name]) for name in ("sync", "lazy", "layer", "rms")] == kinds
    assert type(model["group"]) is syncnorm.GroupNorm
    assert isinstance(model["converted"][1], nn.BatchNorm2d)
    assert model["sync"].num_batches_tracked == 1
    assert model["sync"](torch.full((1, 3, 2, 2), -9.0)).max() == 0  # its ReLU came with it
    assert model["relu"](torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert type(saved["error"]) is syncnorm.DesyncError
    assert type(syncnorm.revert_sync_batchnorm(model["converted"])[1]) is nn.BatchNorm2d
