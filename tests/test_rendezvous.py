"""What the rendezvous reads out of Slurm's variables. That ranks meet is tested under real launchers."""

import pytest

from syncnorm.rendezvous import address_of_this_host, first_host, tasks_per_node


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node[03-05,9],gpu1", "node03"),
        ("gpu[7]", "gpu7"),
        ("gpu7,node[1-2]", "gpu7"),
        ("rack[2-3]n[10,12]-ib,rack9", "rack2n10-ib"),
    ],
)
def test_first_host(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(("counts", "tasks"), [("4", [4]), ("2(x3),1", [2, 2, 2, 1]), ("1,12(x2)", [1, 12, 12])])
def test_tasks_per_node(counts, tasks):
    assert tasks_per_node(counts) == tasks


def test_a_given_address_is_taken(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.1.2.3")
    assert address_of_this_host() == "10.1.2.3"
