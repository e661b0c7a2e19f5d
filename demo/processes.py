"""The processes of the demo: a broker, a worker, readers. Each is always ended again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence

import amqp
import kombu

from celery_amqp_results.protocol.names import Topology
from demo import interrupts
from tools import rabbitmq

ROOT = Path(__file__).resolve().parent.parent

#: Seconds for a worker to become ready, and for a process to end before it is killed.
READY = 60.0
GRACE = 3.0


def settings(broker: str, name: str, shards: int) -> Dict[str, str]:
    """Return the environment variables from which :mod:`demo.tasks` makes its app.

    Parameters:
        broker: URL of the broker.
        name: first part of the name of everything that is declared on it.
        shards: how many queues keep the results.
    """
    return {"DEMO_BROKER": broker, "DEMO_NAME": name, "DEMO_SHARDS": str(shards)}


class Failed(Exception):
    """Raised when the demo cannot go on; the message says why."""


class Broker:
    """A RabbitMQ that the demo may use.

    Parameters:
        url: where it is.
        node: the node if the demo has started it, or ``None`` for a broker of the user.
        name: first part of the name of everything that the demo declares.
        shards: how many queues keep the results.
    """

    def __init__(self, url: str, node: Optional[rabbitmq.Node], name: str, shards: int) -> None:
        self.url = url
        self.node = node
        self.name = name
        self.topology = Topology(name, shards, "classic")
        #: Queues that are deleted at the end if they still exist.
        self.others: List[str] = []

    def product(self) -> str:
        """Return name and version of the broker.

        Raises:
            Failed: when it does not answer.
        """
        with self._connection() as connection:
            properties = connection.server_properties
            return f"{properties.get('product', 'AMQP broker')} {properties.get('version', '')}"

    @contextlib.contextmanager
    def _connection(self) -> Any:
        client = kombu.Connection(self.url, connect_timeout=30)
        try:
            yield client.connection
        except (OSError, amqp.AMQPError, kombu.exceptions.OperationalError) as exc:
            raise Failed(f"no RabbitMQ answers at {client.as_uri()}: {exc}") from exc
        finally:
            client.release()

    def queues(self) -> int:
        """Return how many queues there are.

        A private node counts all its queues. On the user's own broker, where listing may be
        forbidden, only the demo's declared queues are counted, by name.
        """
        if self.node is not None:
            return self.node.queue_count()
        return sum(self._exists(name) for name in self._names())

    def _names(self) -> List[str]:
        shards = range(self.topology.shards)
        return [f"{self.name}.tasks", *(self.topology.shard_queue_name(n) for n in shards)]

    def _exists(self, queue: str) -> bool:
        with self._connection() as connection:
            try:
                connection.channel().queue_declare(queue, passive=True)
            except amqp.NotFound:
                return False
            return True

    def clean_up(self) -> None:
        """Delete everything the demo has declared that does not go away with a private node."""
        if self.node is not None:
            return
        with self._connection() as connection:
            channel = connection.channel()
            # Deleting a missing queue is not an error.
            for name in (*self._names(), *self.others):
                channel.queue_delete(name)
            for name in (self.topology.exchange, f"{self.name}.tasks"):
                channel.exchange_delete(name)


class Process:
    """A Python process of the demo, in its own session: Ctrl-C does not reach it.

    Parameters:
        module: the module to run.
        arguments: its arguments.
        variables: additional environment variables.
        output: file for its output; ``None`` to read it with :meth:`answers`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        variables: Mapping[str, str],
        output: Optional[Path] = None,
    ) -> None:
        self._output = output
        with contextlib.ExitStack() as stack:
            target: Any = subprocess.PIPE
            if output is not None:
                target = stack.enter_context(output.open("wb"))
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                cwd=ROOT,
                env=dict(os.environ, PYTHONUNBUFFERED="1", **variables),
                stdin=subprocess.PIPE,
                stdout=target,
                stderr=subprocess.STDOUT if output is not None else subprocess.PIPE,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def ask(self, question: Dict[str, Any]) -> None:
        """Write *question* to its standard input."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question).encode())
            self._process.stdin.close()

    def answers(self) -> Iterator[Dict[str, Any]]:
        """Yield the lines of its output, decoded, until it ends.

        Raises:
            Failed: when it fails.
        """
        process = self._process
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            yield json.loads(line)
        complaints = process.stderr.read()
        if process.wait():
            raise Failed(f"a reader failed:\n{complaints.decode(errors='replace')[-2000:]}")

    def log(self) -> str:
        """Return the end of its output."""
        assert self._output is not None
        return self._output.read_text(errors="replace")[-2000:]

    def wait_for(self, text: str) -> None:
        """Wait until it has printed *text*.

        Raises:
            Failed: when it ends first, or takes too long.
        """
        deadline = time.monotonic() + READY
        while text not in self.log():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise Failed("the worker did not start; its log ends:")
            time.sleep(0.05)

    def end(self) -> None:
        """End it, gently at first, together with the processes that it has started."""
        process = self._process
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def start(stack: contextlib.ExitStack, *args: Any, **kwargs: Any) -> Process:
    """Start a :class:`Process` that *stack* ends."""
    with interrupts.held():
        process = Process(*args, **kwargs)
        stack.callback(process.end)
    return process


def start_node(stack: contextlib.ExitStack) -> rabbitmq.Node:
    """Start a private RabbitMQ that *stack* ends.

    Raises:
        tools.rabbitmq.NotAvailable: when none is installed, and none can be.
    """
    rabbitmq.ensure_installed()
    node = rabbitmq.Node(rabbitmq.distribution())
    # Starting takes a few seconds, and the process to end is known only after that.
    with interrupts.held():
        stack.callback(node.stop)
        # Its data is discarded, so it need not shut down cleanly.
        stack.callback(node.kill)
        node.start()
    return node
