"""What a process holds after its connections were reset again and again."""

from __future__ import annotations

from bench.flat import reconnect


def test_nothing_is_left_of_connections_that_were_reset(amqp_url: str, node: object) -> None:
    first, *_, last = reconnect(30, amqp_url)
    # Then each connection has replaced another, and so has what belongs to it. Some may be about to
    # end or to begin in this moment; what was left of each would be many more.
    some = 5
    assert last.descriptors <= first.descriptors + some
    assert last.threads <= first.threads + some
    assert last.connections <= first.connections + some
