"""Errors against an oracle, recorded for the summary of ./launch/gpu and held against a bound."""

import torch


def error(actual, expected, *, absolute=False):
    """Return the largest error, relative to the largest value expected if that is above 1."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    actual, expected = actual.detach().to(expected.device, torch.float64), expected.detach().double()
    largest = 1.0 if absolute else max(1.0, expected.abs().max().item())
    return (actual - expected).abs().max().item() / largest


def check(record_property, what, actual, expected, bound, *, absolute=False):
    """Assert that the error is within the bound, and record both as properties of the test."""
    found = error(actual, expected, absolute=absolute)
    record_property(f"error: {what}", found)
    record_property(f"bound: {what}", bound)
    assert found <= bound, f"expected an error of at most {bound:g}, got {found:g}: {what}"
