"""The package's types in the eyes of users' type checkers: a script that is right passes, one that is not does not."""

import json
import os
import sys
import textwrap
from pathlib import Path

import pytest
from processes import run

ROOT = Path(__file__).parent.parent

SCRIPT = """
    import torch
    from torch import Tensor, nn

    import syncnorm
    from syncnorm.testing import CountingCommunicator, run_ranks


    def train(steps: int) -> float:
        group: syncnorm.Communicator = syncnorm.init(timeout=10)
        model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        model = syncnorm.convert_sync_batchnorm(model, group, fuse="auto")
        layer = syncnorm.SyncBatchNorm(8, momentum=None, process_group=CountingCommunicator(group), activation="relu")
        x = torch.randn(2, 8, 4, 4)
        y: Tensor = layer(x, residual=x, mask=torch.ones(2, 4, 4, dtype=torch.bool))
        y = syncnorm.functional.sync_batch_norm(y, None, None, training=True)
        y = syncnorm.functional.layer_norm(syncnorm.functional.rms_norm(y, [4]), [4])
        for norm in (syncnorm.LayerNorm(4), syncnorm.RMSNorm(4), syncnorm.GroupNorm(2, 8)):
            y = norm(y)
        with syncnorm.debug(), syncnorm.join(model), syncnorm.patch_torch():
            torch.autograd.backward(y.sum())
        syncnorm.assert_running_stats_agree(model)
        syncnorm.sync_running_stats(model)
        syncnorm.recompute_running_stats(model, [x])
        node: syncnorm.Communicator = syncnorm.new_subgroups("node")
        total: float = node.all_reduce(torch.ones(steps)).sum().item()
        return total


    def main() -> None:
        try:
            losses: list[float] = run_ranks(train, 2, 3, backend="gloo", timeout=60)
        except syncnorm.SyncNormError as error:
            raise SystemExit(1) from error
        model = syncnorm.revert_sync_batchnorm(syncnorm.LazySyncBatchNorm())
        print(model, losses)
"""
WRONG = {
    "init(timeout=10)": "init(10)",
    'fuse="auto"': 'fuse="sometimes"',
    'new_subgroups("node")': 'new_subgroups("rack")',
    "GroupNorm(2, 8)": "GroupNorm(2, '8')",
    "losses: list[float]": "losses: list[str]",
}


CHECKERS = {  # their commands in strict mode, and how they count one error
    "mypy": (["mypy", "--strict", "--cache-dir", "cache", "train.py"], "Found 1 error in 1 file"),
    "pyright": (["pyright", "--pythonpath", sys.executable, "--project", "strict.json"], "1 error, 0 warnings"),
}
STRICT = {"typeCheckingMode": "strict", "include": ["train.py"], "extraPaths": [str(ROOT)]}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_script_is_typed(checker, tmp_path):
    command, one_error = CHECKERS[checker]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # mypy does not see editable installations
    (tmp_path / "strict.json").write_text(json.dumps(STRICT))

    def check(code):
        (tmp_path / "train.py").write_text(textwrap.dedent(code))
        job = run(sys.executable, "-m", *command, cwd=tmp_path, env=environment, timeout=110)
        return job.returncode, job.stdout

    status, output = check(SCRIPT)
    assert status == 0, output
    for right, wrong in WRONG.items():
        status, output = check(SCRIPT.replace(right, wrong))
        assert status == 1
        assert "train.py:" in output
        assert one_error in output, output
