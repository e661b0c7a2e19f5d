"""A channel in confirm mode handles the broker's answers, on a model of its connection."""

from __future__ import annotations

import collections
import logging
import types
from typing import Any, Callable, Deque, Dict, Iterator, List, Optional, Set, Tuple

import pytest
from amqp import spec
from amqp.exceptions import NotFound, RecoverableConnectionError

from celery_amqp_results import errors
from celery_amqp_results.amqp import confirms, frames
from celery_amqp_results.amqp.confirm_log import Outgoing, Publication, Status
from celery_amqp_results.amqp.confirms import ConfirmChannel
from celery_amqp_results.toolkit import retry
from tests.unit.broker_model import Clock

NUMBER, FRAME_MAX = 7, 100
PUSHED = ("states", "key")


class Channel:
    """A channel whose events are those of py-amqp."""

    channel_id = NUMBER
    is_open = True

    def __init__(self) -> None:
        self.events: Dict[str, Set[Callable[..., None]]] = collections.defaultdict(set)
        #: What is called for an answer, by its method.
        self._callbacks: Dict[Tuple[int, int], Callable[[], None]] = {}
        self.requests: List[Tuple[int, int]] = []
        self.selected: List[bool] = []
        #: What asking for a queue returns or raises.
        self.answer: Any = None
        self.asked: List[Tuple[str, bool]] = []

    def confirm_select(self, nowait: bool) -> None:
        self.selected.append(nowait)

    def queue_declare(self, queue: str, passive: bool) -> Any:
        self.asked.append((queue, passive))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def send_method(self, method: Tuple[int, int], format: str, arguments: Any) -> None:
        self.requests.append(method)

    def answer_request(self, method: Tuple[int, int]) -> None:
        self._callbacks[method]()

    def tell(self, event: str, *arguments: Any) -> None:
        (handler,) = self.events[event]
        handler(*arguments)


class Link:
    """A connection on which frames of the broker arrive at given times."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.blocked: Optional[str] = None
        self.bytes_sent = 0
        self.written: List[bytes] = []
        transport = types.SimpleNamespace(write=self.written.append)
        self.amqp = types.SimpleNamespace(
            connected=True, frame_max=FRAME_MAX, bytes_sent=0, transport=transport
        )
        self.channels: List[Channel] = []
        #: Seconds until some frames arrive, and the frames: confirms, or anything else.
        self.coming: Deque[Tuple[float, List[Any]]] = collections.deque()
        self._buffer: Deque[Any] = collections.deque()
        #: The timeouts of all waits for the socket.
        self.waits: List[float] = []

    def channel(self) -> Channel:
        self.channels.append(Channel())
        return self.channels[-1]

    def arrive(self, *arriving: Any, after: float = 0.0) -> None:
        self.coming.append((self.clock.monotonic() + after, list(arriving)))

    def _pass(self, seconds: float) -> None:
        self.clock.microseconds += round(seconds * 1e6)

    def readable(self, timeout: float = 0.0) -> bool:
        self.waits.append(timeout)
        if self._buffer:
            return True
        left = self.coming[0][0] - self.clock.monotonic() if self.coming else timeout + 1.0
        self._pass(max(0.0, min(left, timeout)))
        return left <= timeout

    #: There is always room to send.
    ready = readable

    def flush(self) -> None:
        """Do nothing: nothing is kept."""

    def tick(self) -> None:
        """Do nothing: there are no heartbeats."""

    def acks(self, channel: int) -> Iterator[Tuple[int, bool]]:
        assert channel == NUMBER
        self._fill()
        while self._buffer and isinstance(self._buffer[0], tuple):
            yield self._buffer.popleft()

    def drain(self, timeout: float) -> bool:
        assert timeout == 0.0
        self._fill()
        self._buffer.popleft()()
        return True

    def _fill(self) -> None:
        if self.coming and self.coming[0][0] <= self.clock.monotonic():
            self._buffer.extend(self.coming.popleft()[1])

    def buffered(self) -> bool:
        return bool(self._buffer)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Link:
    made = Link()
    for module in (confirms, retry):
        monkeypatch.setattr(module, "time", made.clock)
    return made


def on(link: Link, **options: bool) -> ConfirmChannel:
    return ConfirmChannel(link, **options)  # type: ignore[arg-type]


def made(name: str) -> Publication:
    message = Outgoing("q", {"correlation_id": name}, name.encode() * 200, 0, name, PUSHED)
    return Publication(message)


def published(channel: ConfirmChannel, *names: str) -> List[Publication]:
    publications = [made(name) for name in names]
    for each in publications:
        channel.publish(each)
    return publications


def test_a_channel_asks_for_confirms_without_a_round_trip(link: Link) -> None:
    channel: Any = on(link)
    assert [each.selected for each in link.channels] == [[True]]
    assert (channel.link, channel.channel) == (link, link.channels[0])


def test_answers_that_py_amqp_reads_are_noted(link: Link, caplog: Any) -> None:
    channel = on(link)
    events = link.channels[0]
    one, two, three = published(channel, "a", "b", "c")
    with caplog.at_level(logging.INFO):
        events.tell("basic_ack", 3, True)
        assert [p.status for p in (one, two, three)] == [*[Status.CONFIRMED] * 2, Status.SENT]
        body = three.message.body
        returned = types.SimpleNamespace(properties={"correlation_id": "c"}, body=body)
        events.tell("basic_return", None, "", "other", returned)
        assert not three.returned
        events.tell("basic_return", None, "", "q", returned)
        assert three.returned
        events.tell("basic_nack", 5, False)
        assert three.status is Status.REFUSED
        assert caplog.text == ""
        events.tell("basic_nack", 6, True)
    # The live copies of the second and the third message.
    assert [p.copying for p in (two, three)] == [False, False]
    assert [record.message for record in caplog.records] == [
        "a queue bound to the exchange refuses a state, which is kept all the same"
    ]


def test_messages_are_told_apart_by_what_comes_back_of_them(link: Link) -> None:
    channel = on(link)
    one, two = published(channel, "a", "b")
    other = types.SimpleNamespace(properties={}, body=two.message.body)
    link.channels[0].tell("basic_return", None, "", "q", other)
    assert (one.returned, two.returned) == (False, True)
    third, fourth = (Publication(Outgoing("q", {"message_id": n}, b"same")) for n in "cd")
    channel.publish(third)
    channel.publish(fourth)
    other = types.SimpleNamespace(properties=fourth.message.properties, body=b"same")
    link.channels[0].tell("basic_return", None, "", "q", other)
    assert (third.returned, fourth.returned) == (False, True)


# -- publishing --------------------------------------------------------------------------------


@pytest.mark.parametrize("push", [False, True])
def test_a_message_and_its_live_copy_are_written_at_once(link: Link, push: bool) -> None:
    channel, one = on(link), made("a")
    one.push = push
    channel.publish(one)
    message = one.message
    addresses = [("", "q", True), *[(*PUSHED, False)] * push]
    assert link.written == [
        frames.publish_frames(NUMBER, FRAME_MAX, message.properties, message.body, *addresses)
    ]
    assert (one.status, one.copying) == (Status.SENT, push)
    assert one.sent == link.clock.monotonic()


def test_a_live_copy_that_was_held_is_written_to_the_exchange(link: Link) -> None:
    channel, one = on(link), made("a")
    one.push = False
    channel.publish(one)
    channel.publish_copy(one)
    message = one.message
    assert link.written[1:] == [
        frames.publish_frames(NUMBER, FRAME_MAX, message.properties, message.body, (*PUSHED, False))
    ]
    assert one.copying
    # Its confirm has the tag after the message's.
    channel.log.acknowledged(2, False)
    assert (one.status, one.copying) == (Status.SENT, False)


def test_the_answer_to_a_request_says_that_live_copies_are_routed(link: Link) -> None:
    channel = on(link)
    publication = made("a")
    channel.publish(publication)
    channel.ask_about_copies()
    assert link.channels[0].requests == [spec.Basic.Qos]
    assert not publication.routed
    link.clock.microseconds += 2_000_000
    link.channels[0].answer_request(spec.Basic.QosOk)
    assert publication.routed_at == link.clock.monotonic()


def test_nothing_is_published_on_a_closed_channel(link: Link) -> None:
    channel, one = on(link), made("a")
    link.channels[0].is_open = False
    for publish in (channel.publish, channel.publish_copy):
        with pytest.raises(RecoverableConnectionError, match=r"^the channel is closed$"):
            publish(one)
    assert (one.status, one.copying, link.written) == (Status.UNSENT, False, [])


def test_a_message_that_cannot_be_written_counts_as_sent(link: Link) -> None:
    # So it is among those that were lost with the connection.
    channel, one = on(link), made("a")
    link.amqp.connected = False
    with pytest.raises(RecoverableConnectionError):
        channel.publish(one)
    assert channel.log.lost(OSError("cut")) == [one]


# -- alarms ------------------------------------------------------------------------------------


def test_a_channel_in_an_alarm_is_mute_until_the_broker_has_answered_a_message(link: Link) -> None:
    channel = on(link, in_alarm=True)
    assert channel.mute is False
    published(channel, "a", "b")
    assert channel.mute is True
    channel.log.acknowledged(1, False)
    assert channel.mute is False


def test_a_channel_outside_an_alarm_is_mute_only_while_the_broker_blocks_it(link: Link) -> None:
    channel = on(link)
    published(channel, "a")
    assert channel.mute is False
    link.blocked = "low on memory"
    assert channel.mute is True


def test_progress_grows_with_answers_and_with_bytes_sent(link: Link) -> None:
    channel = on(link)
    link.bytes_sent = 50
    assert channel.progress == 50
    channel.log.acknowledged(1, False)
    channel.log.acknowledged(2, False)
    assert channel.progress == 52


# -- waiting -----------------------------------------------------------------------------------


def test_a_wait_ends_when_all_messages_are_answered(link: Link) -> None:
    channel = on(link)
    one, two = published(channel, "a", "b")
    link.arrive((1, False), after=0.5)
    link.arrive((3, False), after=3.0)
    began = link.clock.monotonic()
    channel.wait(iter([one, two]))
    assert [p.status for p in (one, two)] == [Status.CONFIRMED] * 2
    assert link.clock.monotonic() - began == pytest.approx(3.0, abs=0.01)
    # The socket is looked at in between, without a wait.
    assert {wait for wait in link.waits if wait} == {1.0}
    # Nothing is read for messages that are answered.
    link.waits.clear()
    channel.wait([one, two], 0.0)
    assert link.waits == []


@pytest.mark.parametrize("blocked", [None, "low on memory"])
def test_a_wait_ends_at_its_deadline(link: Link, blocked: Optional[str]) -> None:
    channel = on(link)
    (one,) = published(channel, "a")
    link.blocked = blocked
    with pytest.raises(errors.NotConfirmed) as caught:
        channel.wait([one], link.clock.monotonic() + 2.5)
    why = ": the broker blocks publishers (low on memory: a memory or disk alarm)"
    assert str(caught.value) == f"no confirm from the broker within 2.5 s{why if blocked else ''}"
    assert one.status is Status.SENT
    assert [round(wait, 3) for wait in link.waits] == [1.0, 1.0, 0.5]


def test_a_wait_with_a_deadline_of_now_takes_in_what_is_there(link: Link) -> None:
    channel = on(link)
    one, two = published(channel, "a", "b")
    link.arrive((3, True))
    channel.wait([one, two], link.clock.monotonic())
    (late,) = published(channel, "c")
    with pytest.raises(errors.NotConfirmed, match=r"within 0\.0 s$"):
        channel.wait([late], link.clock.monotonic())


def test_a_wait_without_a_deadline_ends_when_the_connection_counts_as_dead(link: Link) -> None:
    channel = on(link)
    (one,) = published(channel, "a")
    began = link.clock.monotonic()
    # Sending goes on for a while, and the broker blocks publishers for a while.
    link.arrive(lambda: setattr(link, "bytes_sent", 5), after=20.0)
    link.arrive(lambda: setattr(link, "blocked", "low on memory"), after=45.0)
    link.arrive(lambda: setattr(link, "blocked", None), after=400.0)
    with pytest.raises(errors.NotConfirmed) as caught:
        channel.wait([one])
    assert str(caught.value) == "no confirm from the broker within 30 s"
    waited = link.clock.monotonic() - began
    assert 400.0 + confirms.CONFIRM_TIMEOUT - 2 <= waited <= 400.0 + confirms.CONFIRM_TIMEOUT + 2


# -- taking in answers -------------------------------------------------------------------------


def test_everything_that_was_received_is_taken_in(link: Link) -> None:
    channel = on(link)
    one, two, three = published(channel, "a", "b", "c")
    others: List[int] = []
    link.arrive((1, False), (2, False), lambda: others.append(1), (5, True))
    channel.take_in()
    assert others == [1]
    assert [p.status for p in (one, two, three)] == [Status.CONFIRMED] * 3
    assert (one.copying, two.copying, three.copying) == (False, False, True)
    assert set(link.waits) == {0.0}
    # Later frames are left on the socket.
    link.arrive((6, False))
    link.arrive(lambda: others.append(2))
    channel.take_in_readable()
    assert (three.copying, others) == (False, [1])
    channel.take_in()
    assert others == [1, 2]


def test_nothing_is_taken_in_before_something_has_come(link: Link) -> None:
    channel = on(link)
    (one,) = published(channel, "a")
    link.arrive((1, False), after=0.001)
    channel.take_in()
    assert (one.status, len(link.coming)) == (Status.SENT, 1)


# -- requests ----------------------------------------------------------------------------------


def test_requests_share_a_channel_of_their_own(link: Link) -> None:
    channel = on(link)
    assert channel.asking() is channel.asking()
    assert channel.asking() is link.channels[1]
    assert len(link.channels) == 2


def test_the_length_of_a_queue_is_what_the_broker_reports(link: Link) -> None:
    channel = on(link)
    asking: Any = channel.asking()
    asking.answer = types.SimpleNamespace(message_count=5, consumer_count=2)
    assert channel.length("q") == confirms.QueueLength(messages=5, consumers=2)
    assert asking.asked == [("q", True)]
    asking.answer = NotFound("NOT_FOUND - no queue 'q' in vhost '/'", (50, 10), 404)
    assert channel.length("q") is None
    asking.answer = NotFound("NOT_FOUND - home node of durable queue 'q' is down", (50, 10), 404)
    with pytest.raises(NotFound):
        channel.length("q")
