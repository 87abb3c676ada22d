"""Combinations of options that nobody thought of, against the oracle; and thousands of steps, which hold nothing.

    pytest tests/test_fuzz.py                      a few drawn batches of cases, always the same
    SYNCNORM_FUZZ=long pytest tests/test_fuzz.py   hundreds, others in each run

A failure names the case, as code: `compare(run_ranks, case.world_size, [case])` repeats it.
"""

import os

import pytest
import torch
from fuzz import check, described, expectation, held_around, in_pairs, on_ranks, sizes_of, soak, soak_in_one_process
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from oracle import ACTIVATE, Case, Plain

from syncnorm.testing import run_ranks

LONG = os.environ.get("SYNCNORM_FUZZ") == "long"
SECONDS = 3600 if LONG else 120  # for a test
BATCHES = 100 if LONG else 3  # for each test
CASES = 25  # of a batch, for which the ranks start once
STEPS, WARMUP, COMPARED = (10_000 if LONG else 1_500), 500, 200  # of the soak
GROWTH = 8 * 2**20  # bytes that the resident memory may grow by after the warm-up

pytestmark = pytest.mark.timeout(SECONDS)

SAMPLES = [3, 0, 1, 2, 4, 5, 8, 17]
LENGTHS = [(), (6, 1, 2, 3, 9, 16, 33, 64, 0), (4, 1, 2, 3, 5, 7, 8, 16), (2, 1, 3, 4, 5)]  # by number of axes
MEANS = [0.0, 1.0, -30.0, 1e3, 1e4]
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *HALVES]
LAYERS = {  # arguments of the layer, with values other than the default
    "momentum": [None, 0.7, 1.0, 0.0],
    "eps": [1e-3],
    "track_running_stats": [False],
    "affine": [False],
    "bias": [False],
    "reproducible": [True],
}


@st.composite
def shapes(draw, world_size):
    """Draw the shapes of the shards: uneven, empty, one sample on each, other lengths on some rank."""
    channels = draw(st.sampled_from([3, 1, 2, 4, 8, 17]))
    axes = draw(st.sampled_from([2, 0, 1, 3]))
    trailing = st.tuples(*[st.sampled_from(LENGTHS[axes])] * axes)
    common, differ = draw(trailing), draw(st.sampled_from([False, False, True]))
    samples = st.just(1) if draw(st.sampled_from([False] * 4 + [True])) else st.sampled_from(SAMPLES)
    return tuple((draw(samples), channels, *(draw(trailing) if differ else common)) for _ in range(world_size))


@st.composite
def layers(draw, residual):
    """Draw the arguments of a layer."""
    layer = {name: draw(st.sampled_from(values)) for name, values in LAYERS.items() if draw(one_in(4))}
    activation = draw(st.sampled_from(list(ACTIVATE)))
    layer |= {} if activation is None else {"activation": activation}
    if activation in (None, "leaky_relu") and not residual and draw(st.booleans()):
        layer["inplace"] = True
    return layer


@st.composite
def masks(draw, world_size):
    """Draw the fields of a case with a mask."""
    return {
        "valid": tuple(draw(st.sampled_from([0.6, 0, 0.1, 0.3, 0.9, 1])) for _ in range(world_size)),
        "mask_dtype": draw(st.sampled_from([torch.bool, *DTYPES])),
        "mask_has_channel_axis": draw(st.booleans()),
    }


@st.composite
def cases(draw, world_size):
    """Draw a case."""
    split = draw(shapes(world_size))
    dtype = draw(st.sampled_from(DTYPES))
    residual = draw(one_in(3))
    masked = draw(one_in(3))
    fields = draw(masks(world_size)) if masked else {}
    if len(split[0]) == 4 and draw(st.booleans()):
        fields["memory_format"] = torch.channels_last
    if draw(one_in(4)):
        fields["param_dtype"] = torch.float64
    layer = draw(layers(residual))
    # Values that the mask leaves out are 50 times as large. They exceed float16. In place, backward recomputes the
    # input from the rounded output, and multiplies its error by them.
    near = masked and (dtype == torch.float16 or (dtype in HALVES and "inplace" in layer))
    return Case(
        split,
        dtype,
        mean=draw(st.sampled_from([mean for mean in MEANS if abs(mean) <= 1 or not near])),
        layer=layer,
        residual=residual,
        steps=draw(st.sampled_from([1, 2, 3])),
        **fields,
    )


def one_in(n):
    return st.sampled_from([False] * (n - 1) + [True])


@st.composite
def batches(draw, world_size):
    """Draw cases to which the oracle has an answer, some `CASES`. A batch shrinks to one case."""
    answered = cases(world_size).filter(expectation)
    return [draw(answered) for _ in range(CASES) if draw(st.sampled_from([False] + [True] * 15))]


@pytest.fixture
def fuzz(run, tmp_path):
    """Return what calls a function on drawn values, the same on all ranks of an MPI job, and leaves no file."""
    number = run(random_seed, 1)[0] if LONG else 0
    if LONG:
        print(f"seed {number}")
    under_mpi = run.__name__ == "run_under_mpirun"  # whose ranks draw alike, but would stop shrinking at other times
    profile = settings(
        max_examples=BATCHES,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink] if LONG and not under_mpi else [Phase.generate],
        report_multiple_bugs=False,
        verbosity=Verbosity.quiet,  # the error names the case, which is shorter than the batch
        suppress_health_check=list(HealthCheck),  # of slow and large examples: one is a start of the ranks
    )
    set_hypothesis_home_dir(tmp_path)
    yield lambda function, strategy: seed(number)(profile(given(strategy)(function)))()
    set_hypothesis_home_dir(None)


def random_seed():
    return int.from_bytes(os.urandom(4), "big")


def compare(run, world_size, drawn):
    """Run the cases on the ranks, which start once, and compare each with the oracle."""
    for case, outcomes in by_case(drawn, run(on_ranks, world_size, drawn)):
        check(case, outcomes)


def by_case(drawn, outcomes_of_ranks):
    """Return each case with the outcomes of all ranks."""
    return zip(drawn, zip(*outcomes_of_ranks, strict=True), strict=True)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_no_combination_of_options_gives_another_result_than_the_whole_batch(run, fuzz, world_size):
    fuzz(lambda drawn: compare(run, world_size, drawn), batches(world_size))


@pytest.mark.parametrize("world_size", [4])
def test_pairs_of_ranks_do_not_disturb_each_other(run, fuzz, world_size):
    def compare_pairs(of_pairs):
        outcomes = run(in_pairs, world_size, of_pairs)
        for drawn, ranks in zip(of_pairs, (outcomes[:2], outcomes[2:]), strict=True):
            for case, of_pair in by_case(drawn, ranks):
                check(case, of_pair)

    fuzz(compare_pairs, st.tuples(batches(2), batches(2)))


def passes(case, outcomes):
    try:
        check(case, outcomes)
    except AssertionError:
        return False
    return True


def is_contrasted(case):
    """Return whether torch takes the data, and several shards of it differ: half-precision values may all be equal."""
    several = sum(0 not in shape for shape in case.shapes) > 1
    same_dtype = case.param_dtype in (None, case.dtype)
    return several and same_dtype and case.dtype not in HALVES and expectation(case) == "normalized"


@pytest.mark.parametrize("world_size", [2, 3])
def test_plain_batch_norm_on_shards_fails_every_case(run, fuzz, world_size):
    """The negative control."""

    def contrast(drawn):
        drawn = [case for case in drawn if is_contrasted(case)]
        for case, outcomes in by_case(drawn, run(on_ranks, world_size, drawn, Plain)):
            assert not passes(case, outcomes), f"passed without synchronization: {described(case)}"
        compared.append(len(drawn))

    compared = []
    fuzz(contrast, batches(world_size))
    assert sum(compared) > 0


@pytest.mark.parametrize("world_size", [4])
def test_thousands_of_steps_hold_no_memory_and_keep_the_ranks_alike(run, world_size, monkeypatch):
    if LONG:
        monkeypatch.setitem(run.__globals__, "TIMEOUT", SECONDS)
    results = run(soak, world_size, STEPS, WARMUP, COMPARED)
    expected = soak_in_one_process(COMPARED, world_size)
    nonempty = sum(any(sizes) for sizes in sizes_of(STEPS, world_size))
    assert nonempty < STEPS
    for rank, (held, early, final) in enumerate(results):
        print(f"rank {rank}: after {WARMUP} steps {held[0]}, after {STEPS} steps {held[1]}")
        for name, buffer in early.items():
            torch.testing.assert_close(buffer.double(), expected[name].double(), rtol=1e-5, atol=1e-5, msg=name)
        for name, buffer in final.items():
            assert torch.equal(buffer, results[0][2][name]), f"{name} differs between ranks"
            assert buffer.isfinite().all(), name
            assert "num_batches" not in name or buffer == nonempty
        assert_flat(*held)


def assert_flat(before, after):
    grown = after.resident - before.resident
    assert grown < GROWTH, f"resident memory grew by {grown / 2**20:.1f} MiB"
    for name in ("descriptors", "threads", "python_threads"):
        assert getattr(after, name) <= getattr(before, name), name


def keeping():
    """Keep 12 KB of each step."""
    kept = []
    return held_around(lambda i: kept.append(torch.full((3_000,), float(i))), STEPS, WARMUP)


def test_a_loop_that_keeps_tensors_is_found_out():
    """The negative control, in a process of its own, where no memory of other tests is free."""
    (held,) = run_ranks(keeping, 1)
    with pytest.raises(AssertionError, match="resident memory grew by"):
        assert_flat(*held)
