"""Tests of the tool that runs private RabbitMQ nodes.

``RABBITMQ_DISTRIBUTIONS`` is a comma-separated list of the distributions to test with; the default
is ``system``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path
from typing import Any, Callable, Iterator, List, Tuple

import amqp
import pytest

from tools import rabbitmq

Eventually = Callable[..., Any]

TOOL = Path(rabbitmq.__file__).resolve()

CHOSEN = [
    name.strip()
    for name in os.environ.get("RABBITMQ_DISTRIBUTIONS", "system").split(",")
    if name.strip()
]


@pytest.fixture(scope="module", params=list(dict.fromkeys(["system", "forky", *CHOSEN])))
def made_of(request: pytest.FixtureRequest) -> rabbitmq.Distribution:
    """A distribution; the tests run with each selected one."""
    name = request.param
    if name not in CHOSEN:
        pytest.skip(f"RABBITMQ_DISTRIBUTIONS does not name {name}")
    try:
        rabbitmq.ensure_installed(name)
        return rabbitmq.distribution(name)
    except rabbitmq.NotAvailable as exc:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(exc))


@pytest.fixture(scope="module")
def node(made_of: rabbitmq.Distribution) -> Iterator[rabbitmq.Node]:
    """A node that tests leave running and empty."""
    with rabbitmq.Node(made_of) as node:
        yield node


@contextlib.contextmanager
def channel_of(port: int) -> Iterator[Any]:
    """A channel on a plain connection as guest."""
    with amqp.Connection(f"127.0.0.1:{port}", read_timeout=20, connect_timeout=20) as connection:
        yield connection.channel()


def traces(node: rabbitmq.Node) -> Tuple[List[int], Path]:
    """Return the processes of a node, including its guard, and its folder."""
    assert node._home is not None
    guard = node._home.guard
    pids = [guard._process.pid, *rabbitmq._descendants(guard._process.pid)]
    assert node.pid in pids
    return pids, guard.folder


def alive(pid: int) -> bool:
    try:
        # A zombie, which has exited but was not reaped, is not alive.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# -- apt's sources ---------------------------------------------------------------------------------


#: A file of one-line sources, and one in the format deb822.
LINES = """
# deb http://commented.example/debian bookworm main
deb https://packages.example/apt cloud-sdk-bookworm main
deb https://docker.example/linux/debian bookworm stable
deb https://security.example/debian-security bookworm-security main
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] https://vendor.example/debian bookworm main
deb http://mirror.example/debian/ bookworm main contrib # the archive
deb http://mirror.example/debian bookworm-updates main
deb-src http://source.example/debian bookworm main
deb cdrom:[Debian]/ bookworm main
deb http://flat.example/ ./
"""
PARAGRAPHS = """
Types: deb deb-src
URIs: mirror+file:{listed}
Suites: bookworm
 bookworm-updates
Components: main

Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
Enabled: no
"""


@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt-get")
def test_the_archives_of_debian_are_found_in_the_configuration_of_apt(tmp_path: Path) -> None:
    # Given both formats, and a file with mirrors
    listed, parts = tmp_path / "mirrors.list", tmp_path / "sources.list.d"
    listed.write_text("https://first.example/debian\thigh\nhttps://second.example/debian\n")
    parts.mkdir()
    (tmp_path / "sources.list").write_text(LINES)
    (parts / "debian.sources").write_text(PARAGRAPHS.format(listed=listed))
    (parts / "ignored.sources.save").write_text(PARAGRAPHS.replace("Enabled: no", ""))
    # When they are read, without the lists of packages
    archives = rabbitmq.apt_archives(
        f"-oDir::Etc::sourcelist={tmp_path / 'sources.list'}",
        f"-oDir::Etc::sourceparts={parts}",
        f"-oDir::State::lists={tmp_path / 'lists'}",
    )
    # Then sources and what is disabled are left out
    assert not {uri for uri in archives if re.search("commented|source|off|flat", uri)}
    assert archives["http://mirror.example/debian"] == {"bookworm", "bookworm-updates"}
    # And a release with its updates is the best guess
    mirrors = rabbitmq.debian_mirrors(archives)
    assert set(mirrors[:3]) == {
        "http://mirror.example/debian",
        "https://first.example/debian",
        "https://second.example/debian",
    }
    assert mirrors[3:] == ["https://vendor.example/debian"]


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "Forky", "../forky", "forky sid"])
def test_an_invalid_distribution_name_is_refused(name: str) -> None:
    with pytest.raises(rabbitmq.NotAvailable, match="is no distribution: use 'system'"):
        rabbitmq.distribution(name)


def test_an_unknown_plugin_is_refused(made_of: rabbitmq.Distribution) -> None:
    with pytest.raises(ValueError, match="did you mean 'rabbitmq_management'"):
        rabbitmq.Node(made_of, plugins=["rabbitmq_managment"])


def test_an_invalid_node_name_is_refused(made_of: rabbitmq.Distribution) -> None:
    with pytest.raises(ValueError, match="'@localhost' is added"):
        rabbitmq.Node(made_of, name="rabbit@localhost")


def test_a_configuration_error_is_shown(
    made_of: rabbitmq.Distribution, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if made_of.name == "system":
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    node = rabbitmq.Node(made_of, config="no.such.setting = 1")

    with pytest.raises(rabbitmq.StartError, match=r"(?s)ended while it started.*no\.such\.setting"):
        node.start()

    assert not node.running
    assert not list(tmp_path.iterdir())


# -- a node ----------------------------------------------------------------------------------------


def test_clients_can_use_a_node(node: rabbitmq.Node) -> None:
    with channel_of(node.amqp_port) as channel:
        queue, *_ = channel.queue_declare(exclusive=True)
        channel.basic_publish(amqp.Message("hello"), routing_key=queue)
        before = node.queue_count()
        message = channel.basic_get(queue, no_ack=True)

    assert before == 1
    assert message.body == "hello"


def test_a_node_reports_its_facts(node: rabbitmq.Node) -> None:
    assert node.eval("rabbit_misc:version()") == json.dumps(node.version)
    assert node.name in node.ctl("cluster_status")
    assert 10e6 < node.memory() < 2e9
    assert int(node.eval("list_to_integer(os:getpid())")) == node.pid
    assert node.url() == f"amqp://guest:guest@127.0.0.1:{node.amqp_port}//"
    assert node.url("a b", "c/d", "e/f").endswith(
        f"://a%20b:c%2Fd@127.0.0.1:{node.amqp_port}/e%2Ff"
    )
    assert str(node.pid) in repr(node)
    assert "Starting RabbitMQ" in node.log_path.read_text(errors="replace")


def test_an_error_on_a_node_is_shown(node: rabbitmq.Node) -> None:
    with pytest.raises(rabbitmq.CtlError, match="no_such_command"):
        node.ctl("no_such_command")
    with pytest.raises(rabbitmq.CtlError, match="badarith"):
        node.eval("1 div 0")
    with pytest.raises(rabbitmq.CtlError, match="syntax error"):
        node.eval("1 +")


def test_a_node_listens_on_the_loopback_interface_only(node: rabbitmq.Node) -> None:
    pids, _ = traces(node)
    inodes = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    loopback = {"tcp": "0100007F", "tcp6": "00000000000000000000000001000000"}
    ports = set()
    for table, address in loopback.items():
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                assert fields[1].startswith(f"{address}:")
                ports.add(int(fields[1].rpartition(":")[2], 16))

    # AMQP, the distribution, and epmd.
    assert len(ports) == 3
    assert node.amqp_port in ports
    # Clients must never be given one of these ports while the node is down.
    assert max(ports) < first


def test_a_killed_node_keeps_its_durable_queue(made_of: rabbitmq.Distribution) -> None:
    with rabbitmq.Node(made_of) as node:
        with channel_of(node.amqp_port) as channel:
            channel.queue_declare("kept", durable=True, auto_delete=False)
            channel.confirm_select()
            message = amqp.Message("kept too", delivery_mode=2)
            channel.basic_publish_confirm(message, routing_key="kept")
        port, pid = node.amqp_port, node.pid

        node.kill()

        assert not node.running
        assert not alive(pid)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), 1.0)
        node.start()
        assert node.amqp_port == port
        with channel_of(port) as channel:
            assert channel.basic_get("kept", no_ack=True).body == "kept too"

        node.restart()

        assert node.queue_count() == 1


def test_a_stopped_node_leaves_nothing_behind(made_of: rabbitmq.Distribution) -> None:
    node = rabbitmq.Node(made_of)
    node.start()
    with channel_of(node.amqp_port) as channel:
        channel.queue_declare("gone", durable=True, auto_delete=False)
    pids, folder = traces(node)

    node.stop()

    assert [pid for pid in pids if alive(pid)] == []
    assert not folder.exists()
    node.stop()

    with node:
        assert node.queue_count() == 0


def test_a_paused_node_is_silent(node: rabbitmq.Node) -> None:
    node.pause()
    try:
        assert node.running
        assert not rabbitmq._amqp_answers(node.amqp_port, timeout=0.5)
    finally:
        node.resume()
    assert rabbitmq._amqp_answers(node.amqp_port, timeout=20)


def test_a_paused_node_can_be_stopped(made_of: rabbitmq.Distribution) -> None:
    with rabbitmq.Node(made_of) as node:
        pids, folder = traces(node)
        node.pause()

    assert [pid for pid in pids if alive(pid)] == []
    assert not folder.exists()


def test_nodes_with_the_same_name_can_run_side_by_side(
    made_of: rabbitmq.Distribution, node: rabbitmq.Node
) -> None:
    with rabbitmq.Node(made_of, name=node.name.partition("@")[0]) as other:
        assert other.name == node.name
        assert other.pid != node.pid
        assert other.amqp_port != node.amqp_port
    assert node.running


def test_a_taken_port_is_replaced(made_of: rabbitmq.Distribution) -> None:
    node = rabbitmq.Node(made_of)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", node.amqp_port))
        taken.listen()
        with node:
            assert node.amqp_port != taken.getsockname()[1]
            with channel_of(node.amqp_port):
                pass


def test_a_node_with_management(made_of: rabbitmq.Distribution) -> None:
    with rabbitmq.Node(made_of, plugins=["rabbitmq_management"]) as node:
        request = urllib.request.Request(
            f"{node.management_url}/api/whoami",
            headers={"Authorization": "Basic Z3Vlc3Q6Z3Vlc3Q="},
        )
        with urllib.request.urlopen(request, timeout=20) as answer:
            assert json.load(answer)["name"] == "guest"


def test_a_node_with_tls(made_of: rabbitmq.Distribution, tmp_path: Path) -> None:
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl to make a certificate with")
    key, certificate = tmp_path / "key", tmp_path / "certificate"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
         "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip

    with rabbitmq.Node(made_of, tls=rabbitmq.Tls(certificate, certificate, key)) as node:
        context = ssl.create_default_context(cafile=str(certificate))
        with (
            socket.create_connection(("127.0.0.1", node.amqps_port), 20) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            secure.sendall(b"AMQP\x00\x00\x09\x01")
            assert secure.recv(1) == b"\x01"
        assert node.url(tls=True) == f"amqps://guest:guest@127.0.0.1:{node.amqps_port}//"


# -- the owner -------------------------------------------------------------------------------------

OWNER = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
from tools import rabbitmq
node = rabbitmq.Node(rabbitmq.distribution(sys.argv[2]))
node.start()
guard = node._home.guard
child = os.fork()
if child == 0:
    signal.pause()
pids = [guard._process.pid, *rabbitmq._descendants(guard._process.pid)]
print(json.dumps([pids, str(guard.folder), child]), flush=True)
if sys.argv[3] == "wait":
    signal.pause()
"""


@pytest.mark.parametrize("end", ["exit", "killed"])
def test_an_owner_that_exits_leaves_nothing_behind(
    made_of: rabbitmq.Distribution, end: str, eventually: Eventually
) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(TOOL.parent.parent), made_of.name,
         "wait" if end == "killed" else "exit"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    child = None
    try:
        assert owner.stdout is not None
        pids, folder, child = json.loads(owner.stdout.readline())
        assert len(pids) >= 3

        if end == "killed":
            assert Path(folder, ".erlang.cookie").exists()
            owner.kill()
        owner.wait(60)

        # A child that holds a copy of the owner's pipe keeps nothing alive.
        assert alive(child)
        eventually(lambda: not any(map(alive, pids)))
        eventually(lambda: not Path(folder).exists())
    finally:
        owner.kill()
        owner.wait()
        if child is not None:
            os.kill(child, signal.SIGKILL)
        if owner.stdout is not None:
            owner.stdout.close()


def test_a_fork_leaves_the_node_to_its_parent(node: rabbitmq.Node) -> None:
    assert node._home is not None
    guard = node._home.guard
    with warnings.catch_warnings():
        # Newer Pythons warn about threads, which the child here does not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        # As the end of the child's interpreter would do.
        guard._close()
        os._exit(0)
    os.waitpid(child, 0)

    assert node.running
    assert rabbitmq._amqp_answers(node.amqp_port)


# -- clusters --------------------------------------------------------------------------------------


def test_three_nodes_form_a_cluster(made_of: rabbitmq.Distribution) -> None:
    with rabbitmq.Cluster(made_of, 3) as cluster:
        first, second, third = cluster.nodes
        pids, folder = traces(third)
        names = {node.name for node in cluster.nodes}
        status = json.loads(first.ctl("cluster_status", "--formatter", "json"))
        assert set(status["running_nodes"]) == names
        assert len(set(cluster.urls())) == 3
        with channel_of(first.amqp_port) as channel:
            channel.queue_declare("shared", durable=True, auto_delete=False)
        with channel_of(third.amqp_port) as channel:
            channel.queue_declare("shared", passive=True)

        second.kill()
        assert [node.running for node in cluster.nodes] == [True, False, True]
        second.start()

        status = json.loads(first.ctl("cluster_status", "--formatter", "json"))
        assert set(status["running_nodes"]) == names

    assert [pid for pid in pids if alive(pid)] == []
    assert not folder.exists()
    assert cluster.nodes == []


def test_a_cluster_without_nodes_is_refused(made_of: rabbitmq.Distribution) -> None:
    with pytest.raises(ValueError, match="use a size of 1 or more"):
        rabbitmq.Cluster(made_of, 0)


# -- the command line ------------------------------------------------------------------------------


def run_tool(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments],
        capture_output=True,
        encoding="utf-8",
        timeout=300,
        check=False,
        **options,
    )


def test_run_gives_the_command_a_broker_and_returns_its_exit_code(
    made_of: rabbitmq.Distribution,
) -> None:
    script = (
        "import os, sys; from tools import rabbitmq; url = os.environ['AMQP_URL'];"
        "print(url, os.environ['AMQP_URLS'], os.environ['RABBITMQ_VERSION']);"
        "sys.exit(7 if rabbitmq._amqp_answers(int(url.split(':')[-1].strip('/'))) else 1)"
    )

    done = run_tool(
        "run", "--distribution", made_of.name, "--", sys.executable, "-c", script,
        cwd=TOOL.parent.parent, env=dict(os.environ, PYTHONPATH="."),
    )  # fmt: skip

    assert done.returncode == 7, done.stderr
    url, urls, version = done.stdout.split()
    assert url == urls
    assert version == made_of.version
    assert not rabbitmq._port_answers(int(url.rpartition(":")[2].strip("/")))


def test_ctrl_c_leaves_the_node_to_the_command(made_of: rabbitmq.Distribution) -> None:
    script = (
        "import os, signal, sys; from tools import rabbitmq\n"
        "port = int(os.environ['AMQP_URL'].split(':')[-1].strip('/'))\n"
        "def end(*_): sys.exit(5 if rabbitmq._amqp_answers(port) else 1)\n"
        "signal.signal(signal.SIGINT, end); print('ready', flush=True)\n"
        "signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, str(TOOL), "run", "--distribution", made_of.name, "--",
         sys.executable, "-c", script],
        cwd=TOOL.parent.parent, env=dict(os.environ, PYTHONPATH="."),
        stdout=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        # A terminal sends SIGINT to the whole group.
        os.killpg(process.pid, signal.SIGINT)

        assert process.wait(60) == 5


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_start_runs_until_it_is_interrupted(
    made_of: rabbitmq.Distribution, number: signal.Signals
) -> None:
    with subprocess.Popen(
        [sys.executable, str(TOOL), "start", "--distribution", made_of.name],
        stdout=subprocess.PIPE,
        # SIGINT is ignored if a shell runs the tests in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline().decode().strip().rpartition(":")[2].strip("/"))
        assert rabbitmq._amqp_answers(port)

        process.send_signal(number)

        assert process.wait(60) == (0 if number == signal.SIGINT else 128 + number)
        assert not rabbitmq._port_answers(port)


def test_install_and_list_name_the_version(made_of: rabbitmq.Distribution) -> None:
    assert run_tool("install", "--distribution", made_of.name).stdout == (
        f"RabbitMQ {made_of.version}\n"
    )
    assert f"{made_of.name}\t{made_of.version}\n" in run_tool("list").stdout
    assert made_of.name in rabbitmq.available()


def test_wrong_arguments_are_explained() -> None:
    assert "run needs a command, after --" in run_tool("run").stderr
    done = run_tool("install", "--distribution", "No")
    assert done.returncode == 2
    assert "is no distribution: use 'system'" in done.stderr
    done = run_tool("start", "--plugins", "nothing")
    assert done.returncode == 2


def test_a_missing_command_is_explained(made_of: rabbitmq.Distribution) -> None:
    done = run_tool("run", "--distribution", made_of.name, "--", "/no/such/command")

    assert done.returncode == 127
    assert "cannot run '/no/such/command'" in done.stderr
