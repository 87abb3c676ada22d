"""Models of other packages, converted, are the same models: in eval, in training on one rank and on two, and reverted.

Each model is compared with itself before the conversion, in one process, on the whole batch, in float64.
"""

import functools
import traceback
import warnings

import pytest
import timm
import zoo
from same import WORLD_SIZE, check
from zoo.timm import SMALLEST, WITHOUT_BATCH_NORM

from syncnorm.testing import run_ranks

PART = 12  # models that a job of ranks checks
WHAT = 'models converted with `fuse="auto"`: eval, training on 1 and 2 ranks, reverted'
MODELS = {(package, name): model for package in zoo.PACKAGES for name, model in zoo.models_of(package).items()}
KEYS = {package: [key for key in MODELS if key[0] == package] for package in zoo.PACKAGES}
PARTS = [keys[i : i + PART] for keys in KEYS.values() for i in range(0, len(keys), PART)]


def outcomes(keys, *convert):
    """Check models on this rank. Return how many norms each model has and how many were fused, or what went wrong."""
    warnings.simplefilter("ignore")  # of the models that torch.fx cannot trace, and of what the packages deprecate
    found = {}
    for key in keys:
        try:
            found[key] = check(MODELS[key].build, MODELS[key].batch(), *convert)
        except Exception:
            found[key] = traceback.format_exc()
    return found


@functools.cache
def outcomes_of_all_ranks(part):
    return run_ranks(outcomes, WORLD_SIZE, PARTS[part], timeout=550)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("part", "key"),
    [pytest.param(part, key, id=": ".join(key)) for part, keys in enumerate(PARTS) for key in keys],
)
def test_a_converted_model_is_the_same(part, key, ran):
    outcomes = [outcome[key] for outcome in outcomes_of_all_ranks(part)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, str)]
    ran(key[0], WHAT, (0, 0) if errors else outcomes[0])
    assert not errors, errors[0]
    assert outcomes[0][0], "the model has no norm"


def leave_plain(model, process_group=None, fuse=None):
    return model


@pytest.mark.timeout(300)
def test_plain_batch_norm_does_not_pass():
    keys = [keys[0] for keys in KEYS.values()]
    for outcome in run_ranks(outcomes, WORLD_SIZE, keys, leave_plain, timeout=250):
        for key in keys:
            assert "AssertionError: training on two ranks, " in outcome[key]


def test_every_family_of_timm_is_here():
    assert sorted(timm.list_modules()) == sorted([*SMALLEST, *WITHOUT_BATCH_NORM.split()])
