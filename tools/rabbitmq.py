"""Private RabbitMQ nodes for the demo, the tests and the benchmarks.

A node has a name, ports, an epmd and a folder of its own, listens on 127.0.0.1 only, and goes away
with the process that started it, even if that is killed. A broker that was there before is never
touched. Standard library only.

    with rabbitmq.Node(rabbitmq.distribution("system")) as node:
        print(node.url())

On the command line::

    python tools/rabbitmq.py run [--distribution system|forky] [--cluster N] -- COMMAND ...
    python tools/rabbitmq.py start
    python tools/rabbitmq.py install [--distribution ...]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import glob
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

__all__ = (
    "Cluster",
    "CtlError",
    "Distribution",
    "Node",
    "NotAvailable",
    "distribution",
    "ensure_installed",
)

#: Seconds until a node has to answer.
START_TIMEOUT = 90.0
STOP_TIMEOUT = 30.0

INSTALL_LINE = "sudo apt-get install --no-install-recommends rabbitmq-server"


class NotAvailable(RuntimeError):
    """Raised when there is no RabbitMQ here; the message has the one line to run."""


class CtlError(RuntimeError):
    """Raised when rabbitmqctl fails; the message has what it printed."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A RabbitMQ that nodes can be made of."""

    #: ``system``, or the name of a Debian suite.
    name: str
    #: The folder that holds it: ``/``, or that of a Debian suite to change root to.
    root: Path

    @property
    def home(self) -> Path:
        """Folder of the release, as seen from within :attr:`root`."""
        found = sorted(glob.glob(str(self.root / "usr/lib/rabbitmq/lib/rabbitmq_server-*")))
        if not found:
            raise NotAvailable(f"no RabbitMQ is installed; run: {INSTALL_LINE}")
        return Path("/") / Path(found[-1]).relative_to(self.root)

    @property
    def version(self) -> str:
        """Version of RabbitMQ."""
        return self.home.name.rpartition("-")[2]

    def command(self, name: str) -> List[str]:
        """Return the command line that runs a script of the release."""
        script = str(self.home / "sbin" / name)
        return [script] if self.name == "system" else ["chroot", str(self.root), script]


def cache_folder() -> Path:
    """Return the folder for what is costly to make."""
    given = os.environ.get("CELERY_AMQP_RESULTS_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "celery-amqp-results"


def distribution(name: str = "system") -> Distribution:
    """Return the distribution *name*, made where it has to be.

    Parameters:
        name: ``system`` for the package that is installed here, or the name of a Debian suite,
            which is put into a folder of the cache.

    Raises:
        NotAvailable: when it is not here and cannot be made.
    """
    found = Distribution(name, Path("/")) if name == "system" else _debian_suite(name)
    found.home  # noqa: B018 - raises where there is none
    return found


def ensure_installed(name: str = "system") -> None:
    """Install the distribution *name* unless it is here.

    Raises:
        NotAvailable: when that is not possible; the message has the one line to run.
    """
    with contextlib.suppress(NotAvailable):
        if name != "system" or distribution(name):
            return
    _apt_install("rabbitmq-server")
    distribution(name)


def _apt_install(package: str) -> None:
    """Install a Debian package without starting any service."""
    become: List[str] = []
    if os.geteuid() != 0:
        become = ["sudo", "-n"]
        if not shutil.which("sudo") or subprocess.run(["sudo", "-n", "true"], check=False).returncode:
            raise NotAvailable(
                f"{package} is not installed and you may not install it; run: "
                f"sudo apt-get install --no-install-recommends {package}"
            )
    if not shutil.which("apt-get"):
        raise NotAvailable(f"{package} is not installed, and this is no Debian: install it by hand")
    # With RUNLEVEL=1 Debian's scripts do not start what they install.
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1")
    install = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "install", "-y",
               "--no-install-recommends", package]  # fmt: skip
    for attempt in range(2):
        done = subprocess.run(
            [*become, *install],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode == 0:
            return
        if attempt == 0:
            subprocess.run(
                [*become, "apt-get", "update"], stdout=subprocess.DEVNULL, check=False
            )
    raise NotAvailable(
        f"{package} could not be installed:\n{done.stdout.decode(errors='replace')[-2000:]}"
    )


def parse_apt_sources(texts: Mapping[str, str]) -> List[str]:
    """Return the addresses of package archives in apt's source files, the first one first.

    Parameters:
        texts: file name to content; both the one-line and the deb822 format.
    """
    found: List[str] = []
    for name, text in texts.items():
        lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
        if name.endswith(".sources"):
            uris = re.findall(r"^URIs:\s*(.+)$", "\n".join(lines), re.MULTILINE)
            found += [uri for line in uris for uri in line.split()]
        else:
            for line in lines:
                match = re.match(r"\s*deb\s+(?:\[[^]]*\]\s+)?(\S+)\s", line)
                if match:
                    found.append(match.group(1))
    return list(dict.fromkeys(found))


def _debian_mirror() -> str:
    texts: Dict[str, str] = {}
    folder = Path("/etc/apt")
    for path in (folder / "sources.list", *sorted(folder.glob("sources.list.d/*"))):
        if path.suffix in (".list", ".sources") and path.is_file():
            texts[path.name] = path.read_text(errors="replace")
    for uri in parse_apt_sources(texts):
        if uri.rstrip("/").endswith("/debian"):
            return uri
    raise NotAvailable("the apt sources of this machine name no Debian archive")


def _debian_suite(suite: str) -> Distribution:
    if not re.fullmatch(r"[a-z]+", suite):
        raise NotAvailable(f"{suite!r} is no distribution: use 'system' or a Debian suite")
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    root = folder / f"rabbitmq-{suite}"
    with (folder / f"rabbitmq-{suite}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return Distribution(suite, root)
        if os.geteuid() != 0:
            raise NotAvailable(f"only root can make a chroot of Debian {suite}")
        if not shutil.which("debootstrap"):
            _apt_install("debootstrap")
        unfinished = folder / f"rabbitmq-{suite}.new"
        if unfinished.exists():
            shutil.rmtree(unfinished)
        # The scripts of sid serve every later suite.
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", "--include=rabbitmq-server", suite,
             str(unfinished), _debian_mirror(), "sid"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
        )  # fmt: skip
        if done.returncode:
            raise NotAvailable(
                f"debootstrap of {suite} failed:\n{done.stdout.decode(errors='replace')[-2000:]}"
            )
        unfinished.rename(root)
    return Distribution(suite, root)


def _free_ports(count: int) -> List[int]:
    """Return ports that were free a moment ago."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


class Node:
    """A private RabbitMQ node.

    Parameters:
        made_of: the distribution.
        plugins: names of plugins to enable, such as ``rabbitmq_management``.
        config: further lines for ``rabbitmq.conf``.
        peer: a node to share cookie and epmd with, for a cluster.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`.
    """

    def __init__(
        self,
        made_of: Optional[Distribution] = None,
        *,
        plugins: Sequence[str] = (),
        config: str = "",
        peer: Optional["Node"] = None,
    ) -> None:
        self.distribution = made_of or distribution()
        self.plugins = tuple(plugins)
        self._config = config
        self._peer = peer
        self.amqp_port, self._dist_port, self._epmd_port, self._management_port = _free_ports(4)
        self._cookie = secrets.token_hex(16)
        if peer is not None:
            self._epmd_port, self._cookie = peer._epmd_port, peer._cookie
        self.name = f"results{secrets.token_hex(4)}@localhost"
        self._folder: Optional[Path] = None
        self._process: Optional["subprocess.Popen[bytes]"] = None
        self._guard: Optional["subprocess.Popen[bytes]"] = None

    def __repr__(self) -> str:
        state = f"port {self.amqp_port}" if self.running else "stopped"
        return f"<Node: RabbitMQ {self.distribution.version}, {state}>"

    def __enter__(self) -> "Node":
        if not self.running:
            self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()

    # -- where things are --------------------------------------------------------------------

    @property
    def version(self) -> str:
        """Version of RabbitMQ."""
        return self.distribution.version

    @property
    def running(self) -> bool:
        """Whether the node's process is there."""
        return self._process is not None and self._process.poll() is None

    def url(self, user: str = "guest", password: str = "guest", vhost: str = "/") -> str:
        """Return the AMQP URL for a user and a virtual host."""
        path = "/" if vhost == "/" else vhost
        return f"amqp://{user}:{password}@127.0.0.1:{self.amqp_port}/{path}"

    @property
    def management_url(self) -> str:
        """URL of the management API, where that plugin is enabled."""
        if "rabbitmq_management" not in self.plugins:
            raise ValueError("the node was made without the plugin rabbitmq_management")
        return f"http://guest:guest@127.0.0.1:{self._management_port}"

    @property
    def log_path(self) -> Path:
        """What the node prints."""
        return self._outside / "output.log"

    @property
    def _outside(self) -> Path:
        assert self._folder is not None, "the node was never started"
        return self._folder

    def _inside(self, name: str = "") -> str:
        """Return a path in the node's folder as the node sees it."""
        path = self._outside / name if name else self._outside
        if self.distribution.name == "system":
            return str(path)
        return "/" + str(path.relative_to(self.distribution.root))

    def _environment(self) -> Dict[str, str]:
        return {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "LANG": "C.UTF-8",
            "HOME": self._inside(),
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.amqp_port),
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_MNESIA_BASE": self._inside("mnesia"),
            "RABBITMQ_LOG_BASE": self._inside("log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PLUGINS_EXPAND_DIR": self._inside("plugins"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": self._inside("enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": self._inside("rabbitmq.conf"),
            "RABBITMQ_PID_FILE": self._inside("pid"),
            "RABBITMQ_CONF_ENV_FILE": self._inside("none.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": self._inside("none.config"),
        }

    # -- life --------------------------------------------------------------------------------

    def _make_folder(self) -> None:
        made_of = self.distribution
        base = None if made_of.name == "system" else str(made_of.root / "tmp")
        folder = Path(tempfile.mkdtemp(prefix="rabbitmq-", dir=base))
        folder.chmod(0o755)
        self._folder = folder
        (folder / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.amqp_port}\n"
            "disk_free_limit.absolute = 50MB\n"
            "log.console = true\n"
            "log.console.level = warning\n"
            + (
                f"management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {self._management_port}\n"
                if "rabbitmq_management" in self.plugins
                else ""
            )
            + self._config
        )
        (folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        cookie = folder / ".erlang.cookie"
        cookie.write_text(self._cookie)
        cookie.chmod(0o400)
        if made_of.name != "system":
            shutil.copy("/etc/hosts", made_of.root / "etc/hosts")
            if not (made_of.root / "proc/self").exists():
                subprocess.run(["mount", "-t", "proc", "proc", str(made_of.root / "proc")], check=True)

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start the node, with the data of its last run, and return when AMQP answers.

        Parameters:
            timeout: seconds.

        Raises:
            RuntimeError: when it does not start; the message has the end of its log.
        """
        if self.running:
            raise RuntimeError(f"{self!r} is running")
        if self._folder is None:
            self._make_folder()
        if self._guard is None:
            self._start_guard()
        with self.log_path.open("ab") as log:
            self._process = subprocess.Popen(
                self.distribution.command("rabbitmq-server"),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        assert self._guard is not None and self._guard.stdin is not None
        self._guard.stdin.write(f"{self._process.pid}\n".encode())
        self._guard.stdin.flush()
        if not _until(lambda: self._answers() or not self.running, timeout) or not self.running:
            tail = self.log_path.read_text(errors="replace")[-3000:]
            self.kill()
            raise RuntimeError(
                f"RabbitMQ {self.version} did not start within {timeout:g} s; its log ends:\n{tail}"
            )

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.amqp_port), 1.0) as one:
                one.settimeout(2.0)
                one.sendall(b"AMQP\x00\x00\x09\x01")
                # A method frame on channel 0: Connection.Start.
                return one.recv(3) == b"\x01\x00\x00"
        except OSError:
            return False

    def _start_guard(self) -> None:
        # Ends the node and removes its folder when this process goes away without doing so: its
        # end of the pipe then closes, whatever happened to us.
        own_epmd = self._peer is None
        self._guard = subprocess.Popen(
            [sys.executable, "-S", "-c", _GUARD, str(self._outside),
             str(self._epmd_port if own_epmd else 0)],
            stdin=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def stop(self) -> None:
        """Stop the node as an operator would, and remove its folder."""
        self.halt()
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait(STOP_TIMEOUT)
            self._guard = None
        self._folder = None

    def halt(self) -> None:
        """Stop the node as an operator would; :meth:`start` goes on with its data."""
        process = self._process
        if process is not None and self.running:
            os.kill(self.pid, signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                self.kill()
        self._end_session()

    def kill(self) -> None:
        """Kill the node with SIGKILL; :meth:`start` goes on with its data."""
        if self._process is not None:
            if self.running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGKILL)
            self._end_session()

    def _end_session(self) -> None:
        if self._process is not None:
            # Helpers of the node's: shell scripts and the disk monitor.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(STOP_TIMEOUT)

    def restart(self) -> None:
        """Stop the node and start it again with its data."""
        self.halt()
        self.start()

    @property
    def pid(self) -> int:
        """The node's Erlang process.

        Raises:
            RuntimeError: when it does not run.
        """
        if self._process is None:
            raise RuntimeError(f"{self!r} does not run")
        for folder in glob.glob("/proc/[0-9]*"):
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = Path(folder, "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) != self._process.pid:
                    continue
                if b"beam" in Path(folder, "cmdline").read_bytes().split(b"\0")[0]:
                    return int(Path(folder).name)
        raise RuntimeError(f"{self!r} has no Erlang process")

    def pause(self) -> None:
        """Freeze the node (SIGSTOP)."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let the node go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    # -- questions ---------------------------------------------------------------------------

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl and return what it prints; takes about a second.

        Raises:
            CtlError: when it fails.
        """
        done = subprocess.run(
            [*self.distribution.command("rabbitmqctl"), "--quiet", *arguments],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            start_new_session=True,
        )
        output = done.stdout.decode(errors="replace")
        if done.returncode:
            raise CtlError(f"rabbitmqctl {' '.join(arguments)}: {output}")
        return output

    def eval(self, expression: str) -> str:
        """Evaluate an Erlang expression on the node and return the printed value."""
        return self.ctl("eval", expression).strip()

    def queue_count(self) -> int:
        """Return how many queues the node has, in all virtual hosts."""
        return int(self.eval("rabbit_amqqueue:count()."))

    def memory(self) -> int:
        """Return the resident memory of the node, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


#: Run with the node's folder and the port of its epmd; told the process groups on its input.
_GUARD = r"""
import glob, os, shutil, signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
folder, port = sys.argv[1:]
groups = [int(line) for line in sys.stdin]
for group in groups:
    for stat in glob.glob("/proc/[0-9]*/stat"):
        try:
            fields = open(stat).read().rpartition(")")[2].split()
            if int(fields[3]) == group:
                os.kill(int(stat.split("/")[2]), signal.SIGKILL)
        except (OSError, ValueError, IndexError):
            pass
if port != "0":
    for path in glob.glob("/proc/[0-9]*/environ"):
        try:
            pid = int(path.split("/")[2])
            if ("ERL_EPMD_PORT=" + port).encode() in open(path, "rb").read().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        except (OSError, ValueError):
            pass
shutil.rmtree(folder, ignore_errors=True)
"""


class Cluster:
    """Several nodes that form one cluster.

    Parameters:
        made_of: the distribution.
        size: how many nodes.
        config: further lines for each ``rabbitmq.conf``.
    """

    def __init__(
        self, made_of: Optional[Distribution] = None, size: int = 3, config: str = ""
    ) -> None:
        made_of = made_of or distribution()
        first = Node(made_of, config=config)
        self.nodes: List[Node] = [
            first,
            *(Node(made_of, config=config, peer=first) for _ in range(size - 1)),
        ]

    def start(self) -> None:
        """Start the nodes and join them."""
        for node in self.nodes:
            node.start()
        for node in self.nodes[1:]:
            node.ctl("stop_app")
            node.ctl("join_cluster", self.nodes[0].name)
            node.ctl("start_app")

    def stop(self) -> None:
        """Stop the nodes, the first one last: the others use its epmd."""
        for node in reversed(self.nodes):
            node.stop()

    def urls(self) -> str:
        """Return the URLs of all nodes, separated by semicolons."""
        return ";".join(node.url() for node in self.nodes)

    def __enter__(self) -> "Cluster":
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


@contextlib.contextmanager
def _running(options: argparse.Namespace) -> Iterator[Tuple[str, str]]:
    ensure_installed(options.distribution)
    made_of = distribution(options.distribution)
    if options.cluster > 1:
        with Cluster(made_of, options.cluster) as cluster:
            yield cluster.urls(), made_of.version
    else:
        with Node(made_of, plugins=[p for p in options.plugins.split(",") if p]) as node:
            yield node.url(), made_of.version


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Runs private RabbitMQ nodes.")
    parser.add_argument("action", choices=("run", "start", "install"))
    parser.add_argument("--distribution", default="system", help="system, or a Debian suite")
    parser.add_argument("--cluster", type=int, default=1, help="how many nodes")
    parser.add_argument("--plugins", default="", help="plugins, separated by commas")
    parser.add_argument("command", nargs="*", help="for run: the command, after --")
    options = parser.parse_args(arguments)
    try:
        if options.action == "install":
            ensure_installed(options.distribution)
            print(f"RabbitMQ {distribution(options.distribution).version}")
            return 0
        with _running(options) as (url, version):
            if options.action == "start":
                print(url, flush=True)
                with contextlib.suppress(KeyboardInterrupt):
                    signal.pause()
                return 0
            environment = dict(
                os.environ, AMQP_URL=url.split(";")[0], AMQP_URLS=url, RABBITMQ_VERSION=version
            )
            return subprocess.run(options.command, env=environment, check=False).returncode
    except NotAvailable as exc:
        print(exc, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
