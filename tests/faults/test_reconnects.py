"""No leaks in a process whose connections are reset again and again."""

from __future__ import annotations

from bench.flat import reconnect


def test_reset_connections_leave_nothing_behind(amqp_url: str, node: object) -> None:
    first, *_, last = reconnect(30, amqp_url)
    # Then each connection and its resources have replaced an earlier one. Some may be opening or
    # closing at this moment; a leak would add up to many more.
    some = 5
    assert last.descriptors <= first.descriptors + some
    assert last.threads <= first.threads + some
    assert last.connections <= first.connections + some
