"""bench/graph.py: in which order CUDA is called. Where there is no GPU, nothing is captured."""

import inspect
from contextlib import contextmanager

import torch

from syncnorm.bench import graph


class Stream:
    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def wait_stream(self, other):
        self.calls.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, calls):
        self.calls = calls

    def replay(self):
        self.calls.append("replay")


def test_a_call_is_captured_after_warm_up_on_another_stream(monkeypatch):
    calls = []
    signature = inspect.signature(torch.cuda.graph)

    @contextmanager
    def on(what):
        calls.append(f"enter {what}")
        yield
        calls.append(f"exit {what}")

    def capture(*arguments, **options):
        bound = signature.bind(*arguments, **options)  # as torch would take it
        assert isinstance(bound.arguments["cuda_graph"], Graph)
        return on("capture")

    main, side = Stream("main", calls), Stream("side", calls)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: on(stream.name))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(calls))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    results = iter("abcdef")
    replay = graph.captured(lambda: calls.append("run") or next(results), torch.device("cuda"))
    warm_up = ["side waits for main", "enter side", "run", "run", "run", "exit side", "main waits for side"]
    assert calls == [*warm_up, "enter capture", "run", "exit capture"]
    calls.clear()
    assert [replay(), replay()] == ["d", "d"]
    assert calls == ["replay", "replay"]
