"""torch's own conversion while `patch_torch` holds."""

import pytest
from torch import nn

import syncnorm
from syncnorm import SyncBatchNorm, patch_torch

ORIGINAL = vars(nn.SyncBatchNorm)["convert_sync_batchnorm"]


@pytest.fixture(autouse=True)
def _is_undone():
    yield
    assert vars(nn.SyncBatchNorm)["convert_sync_batchnorm"] is ORIGINAL


def converted(**options):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU())
    return nn.SyncBatchNorm.convert_sync_batchnorm(model, **options)


def test_in_a_block():
    with patch_torch():
        model = converted()
        assert isinstance(model[0], SyncBatchNorm)
        assert isinstance(model[0], nn.BatchNorm2d)
    assert type(converted()[0]) is nn.SyncBatchNorm
    assert type(syncnorm.revert_sync_batchnorm(model)[0]) is nn.BatchNorm2d


def test_as_a_function():
    patch = patch_torch(fuse=True)
    model = converted(process_group=None)
    patch.undo()
    patch.undo()
    assert (model[0].activation, type(model[1])) == ("relu", nn.Identity)
    assert type(converted()[0]) is nn.SyncBatchNorm


def test_the_process_group_is_passed_on():
    with patch_torch():
        group = syncnorm.communicator()
        assert converted(process_group=group)[0].process_group is group


def test_an_exception_undoes_it():
    with pytest.raises(KeyError), patch_torch():
        raise KeyError
    assert type(converted()[0]) is nn.SyncBatchNorm


def test_blocks_in_blocks():
    with patch_torch(fuse=True):
        with patch_torch():
            assert converted()[0].activation is None
        assert converted()[0].activation == "relu"


def test_undoing_in_another_order_is_refused():
    first, second = patch_torch(), patch_torch()
    with pytest.raises(RuntimeError, match=r"of this patch_torch, got another: undo the later one first"):
        first.undo()
    second.undo()
    first.undo()


def test_torch_s_class_stays_what_it_is():
    with patch_torch():
        assert type(nn.SyncBatchNorm(2)) is nn.SyncBatchNorm
        model = nn.Sequential(nn.SyncBatchNorm(2))
        assert type(nn.SyncBatchNorm.convert_sync_batchnorm(model)[0]) is SyncBatchNorm
