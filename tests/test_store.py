"""Where the job's store listens, and what answers at an address."""

import http.server
import os
import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from syncnorm.job import store

TIMEOUT = timedelta(seconds=10)


def listening(port):
    """Return the addresses, as Linux lists them, on which some process of this host listens at a port."""
    rows = []
    for table in "/proc/net/tcp", "/proc/net/tcp6":
        with open(table) as lines:
            rows += [line.split() for line in lines][1:]
    return {address for _, local, _, state, *_ in rows for address, _, hex_port in [local.partition(":")]
            if state == "0A" and int(hex_port, 16) == port}  # fmt: skip


LOOPBACK, EVERYWHERE = "0100007F", {"00000000", "0" * 32}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_the_store_of_one_host_listens_on_loopback(host):
    opened = store.open_store(host, 0, TIMEOUT)
    assert listening(opened.port) <= {LOOPBACK, "0" * 24 + "01000000"}  # the second is ::1
    assert store.obstacle(host, opened.port, 5) is None
    store.connect(host, opened.port, TIMEOUT).set("key", "value")
    assert opened.get("key") == b"value"


def test_and_torch_own_listens_everywhere():
    opened = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert listening(opened.port) & EVERYWHERE


def test_the_store_of_several_hosts_listens_where_they_meet():
    opened = store.open_store("127.0.0.7", 0, TIMEOUT)
    assert listening(opened.port) == {"0700007F"}
    assert store.obstacle("127.0.0.1", opened.port, 5) == "connection refused"
    assert store.obstacle("127.0.0.7", opened.port, 5) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_that_is_not_of_this_host_is_served_on_all(host):
    opened = store.open_store(host, 0, TIMEOUT)
    assert listening(opened.port) & EVERYWHERE
    assert store.obstacle("127.0.0.1", opened.port, 5) is None


def test_a_name_that_is_loopback_here_may_be_another_address_elsewhere(monkeypatch):
    def resolve(*args, **kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    assert store._addresses("node1") == []
    assert store._addresses("localhost") == [(socket.AF_INET, "127.0.1.1")]
    monkeypatch.setattr(os, "environ", {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"})
    assert store._addresses("node1") == [(socket.AF_INET, "127.0.1.1")]


def test_torch_may_use_the_same_store():
    opened = store.open_store("127.0.0.1", 0, TIMEOUT)
    theirs = dist.TCPStore("127.0.0.1", opened.port, is_master=True, wait_for_workers=False, multi_tenant=True)
    theirs.set("key", "value")
    assert opened.get("key") == b"value"
    port = opened.port
    del opened, theirs
    assert store.obstacle("127.0.0.1", port, 5) == "connection refused"


def test_a_port_in_use_is_told_from_others():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(store.PortInUseError):
        store.open_store("127.0.0.1", taken.getsockname()[1], TIMEOUT)


@pytest.mark.parametrize("libuv", [True, False])
def test_each_kind_of_store_answers(libuv):
    opened = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=libuv)
    assert store.obstacle("127.0.0.1", opened.port, 5) is None
    opened.set("key", "still served")
    assert opened.get("key") == b"still served"


def answer(words):
    """Return the port of a server that answers each connection with these words and closes it."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve():
        while True:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(words)

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def test_other_programs_are_no_store():
    silent = socket.create_server(("127.0.0.1", 0))
    web = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    for port in silent.getsockname()[1], web.server_port, answer(b"HTTP/1.0 400 Bad Request\r\n\r\n"), answer(b""):
        assert store.obstacle("127.0.0.1", port, 0.5) == store.ANOTHER_PROGRAM
    silent.close()
    web.shutdown()
    web.server_close()


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("127.0.0.1", "connection refused"),
        ("no-such-host.invalid", "the name 'no-such-host.invalid' is unknown"),
        ("a" * 70, f"the name '{'a' * 70}' is unknown"),
        ("two words", "the name 'two words' is unknown"),
    ],
)
def test_where_nobody_answers(host, told):
    assert store.obstacle(host, store.free_port(), 5) == told
