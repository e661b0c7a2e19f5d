"""Private RabbitMQ nodes for the demo, the tests and the benchmarks.

A node has its own name, ports, epmd, Erlang cookie and folder, and listens on 127.0.0.1 only, so
other brokers of the machine are never touched. It ends together with the process that started it,
even if that is killed with SIGKILL. Needs Linux, and only the standard library.

    with rabbitmq.Node(rabbitmq.distribution("system")) as node:
        print(node.url())

On the command line (``--help`` has the rest)::

    python tools/rabbitmq.py run [--distribution system|forky] [--cluster N] -- COMMAND ...
    python tools/rabbitmq.py start
    python tools/rabbitmq.py install [--distribution ...]

How it works: a *guard*, a small child process, is the parent of all Erlang processes and the owner
of their folder. Its owner sends it commands through a pipe. When the owner is gone, the guard
kills what it has started and removes the folder. The guard has a session of its own, so Ctrl-C in
a terminal reaches only the owner, which can then clean up in order.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import difflib
import fcntl
import functools
import json
import os
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import weakref
from pathlib import Path
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
)

__all__ = (
    "Cluster",
    "CtlError",
    "Distribution",
    "Node",
    "NotAvailable",
    "StartError",
    "Tls",
    "apt_archives",
    "available",
    "debian_mirrors",
    "distribution",
    "ensure_installed",
)

#: Seconds until a node must answer; a cold start on a busy machine takes about ten.
START_TIMEOUT = 90.0
#: Seconds an orderly stop may take before the node is killed.
STOP_TIMEOUT = 30.0
#: Seconds a command of rabbitmqctl may take; longer than rabbitmqctl's own limit of 60 for most.
CTL_TIMEOUT = 90.0
#: Seconds between two checks of a condition. A check takes far less.
_POLL = 0.02
#: Seconds between the guard's checks that its owner still exists.
_GUARD_POLL = 0.25
#: Seconds the guard waits for processes to disappear after SIGKILL.
_KILL_TIMEOUT = 10.0
#: How often a node whose ports are taken is given new ones.
_PORT_ATTEMPTS = 5
#: Characters of a log that an error message shows; a failed start takes some 6000 of them.
_TAIL = 8000

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#: The PATH of a user may lack its folder.
_CHROOT = "/usr/sbin/chroot"


class NotAvailable(RuntimeError):
    """Raised when a RabbitMQ is not installed and cannot be; the message has the command to run."""


class StartError(RuntimeError):
    """Raised when a node does not start; the message shows the end of its log."""


class CtlError(RuntimeError):
    """Raised when a command fails on a node; the message shows its output."""


# -- distributions ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Distribution:
    """A RabbitMQ from which nodes can be run: see :meth:`system` and :meth:`debian_suite`."""

    #: ``system``, or the name of a Debian suite such as ``forky``.
    name: str
    #: The folder that nodes take as their root: ``/`` unless it is a Debian suite.
    root: Path
    #: Folder of the RabbitMQ release (with ``sbin`` and ``plugins``), as seen from :attr:`root`.
    release: Path

    @classmethod
    def system(cls) -> Distribution:
        """Return the RabbitMQ that is installed on this machine.

        A ``rabbitmq-server`` on the ``PATH`` that belongs to an unpacked release takes precedence
        over the place where the packages of Debian and of RabbitMQ install theirs.

        Raises:
            NotAvailable: if none is installed.
        """
        script = shutil.which("rabbitmq-server")
        if script is not None:
            # Packages install a wrapper there that changes to the user rabbitmq.
            release = Path(script).resolve().parent.parent
            if (release / "sbin/rabbitmq-env").exists():
                return cls("system", Path("/"), release)
        return cls._in_root("system", Path("/"))

    @classmethod
    def debian_suite(cls, suite: str) -> Distribution:
        """Return the RabbitMQ of a Debian suite, installed with debootstrap on first use.

        Its folder is ``rabbitmq-SUITE`` in the cache: ``$CELERY_AMQP_RESULTS_CACHE``, or
        ``celery-amqp-results`` in ``$XDG_CACHE_HOME`` or ``~/.cache``. Installing it takes about
        half a minute and 600 MB, and needs root or a ``sudo`` without a password. Remove the folder
        to get a newer version.

        Parameters:
            suite: such as ``forky``.

        Raises:
            NotAvailable: if *suite* is not the name of a suite, or it cannot be installed.
        """
        return _debian_suite(suite)

    @classmethod
    def _in_root(cls, name: str, root: Path) -> Distribution:
        found = list(root.glob("usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-env"))
        if not found:
            raise NotAvailable(
                f"RabbitMQ is not installed; run: {_install_line('rabbitmq-server')}"
                if name == "system"
                else f"there is no RabbitMQ in {root}; remove that folder to have it made again"
            )
        release = max(found, key=lambda path: path.stat().st_mtime).parent.parent
        return cls(name, root, Path("/") / release.relative_to(root))

    @property
    def version(self) -> str:
        """Version of RabbitMQ, such as ``3.10.8``."""
        for path in self.outside(self.release / "plugins").glob("rabbit-[0-9]*"):
            return path.name[len("rabbit-") :].removesuffix(".ez")
        return self.release.name.rpartition("-")[2]

    def plugins(self) -> List[str]:
        """Return the names of the plugins that a node can enable."""
        names = {
            re.sub(r"-v?\d.*$", "", path.name)
            for path in self.outside(self.release / "plugins").glob("rabbitmq_*")
        }
        return sorted(names)

    def outside(self, path: Path) -> Path:
        """Return this process's path for a path of a node."""
        return self.root / path.relative_to("/")

    def inside(self, path: Path) -> str:
        """Return a node's path for a path of this process."""
        return str(Path("/") / path.relative_to(self.root))

    def command(self, program: str, *arguments: str, env: Mapping[str, str]) -> List[str]:
        """Return the command line that runs a program of the distribution.

        Parameters:
            program: a script of the release such as ``rabbitmqctl``, or a path.
            *arguments: its arguments.
            env: its whole environment.
        """
        if not program.startswith("/"):
            program = str(self.release / "sbin" / program)
        # The environment is part of the command line because chroot and sudo may drop it.
        line = ["/usr/bin/env", "-i", *(f"{k}={v}" for k, v in env.items()), program, *arguments]
        if self.root == Path("/"):
            return line
        # Run as the current user, so that the node can be signalled and its files removed.
        who = f"--userspec={os.geteuid()}:{os.getegid()}"
        line = [_CHROOT, who, str(self.root), *line]
        become = [] if os.geteuid() == 0 else ["sudo", "-n"]
        if not _can_unshare():
            return [*become, *line]
        # A node reads from /proc how much memory and disk it has. /proc is mounted in a separate
        # namespace, so it is invisible elsewhere, ends with the node, and is never walked into
        # when a folder is removed. A node also runs without it, but "rabbitmqctl status" fails.
        mount = f"mount -t proc proc {shlex.quote(str(self.root / 'proc'))} 2> /dev/null"
        return [*become, "unshare", "--mount", "sh", "-c", f'{mount}; exec "$@"', "sh", *line]


def distribution(name: str = "system") -> Distribution:
    """Return the distribution *name*: ``system`` or a Debian suite.

    Raises:
        NotAvailable: if it is not installed and cannot be; see :class:`Distribution`.
    """
    return Distribution.system() if name == "system" else Distribution.debian_suite(name)


def ensure_installed(name: str = "system") -> None:
    """Install the distribution *name* unless it is installed.

    The system's package is installed with apt-get if the user may do so without a password. Its
    service is neither started nor enabled.

    Raises:
        NotAvailable: if that is not possible; the message has the command to run.
    """
    if name != "system":
        Distribution.debian_suite(name)
        return
    try:
        Distribution.system()
    except NotAvailable:
        apt_install("rabbitmq-server")
        Distribution.system()


def available() -> List[str]:
    """Return the names of the installed distributions, without installing any."""
    names = []
    with contextlib.suppress(NotAvailable):
        names.append(Distribution.system().name)
    for folder in sorted(cache_folder().glob("rabbitmq-*/usr")):
        suite = folder.parent.name[len("rabbitmq-") :]
        # A folder that is not named after a suite is an unfinished one.
        if _SUITE.fullmatch(suite):
            with contextlib.suppress(NotAvailable):
                names.append(Distribution._in_root(suite, folder.parent).name)
    return names


def cache_folder() -> Path:
    """Return the folder for downloads and installations; it may not exist."""
    given = os.environ.get("CELERY_AMQP_RESULTS_CACHE")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base).absolute() / "celery-amqp-results"


# -- installing ------------------------------------------------------------------------------------

_SUITE = re.compile(r"[a-z]+")

#: Installs $1 and leaves the machine's services alone. While it runs, a policy prevents the package
#: from starting its service. The policy has no effect once this shell is gone, in case it is killed
#: before it removes the file. An existing policy stays in place and is never called.
_INSTALL_SCRIPT = r"""
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 130' INT TERM HUP
    printf '#!/bin/sh\n[ -d /proc/%s ] && exit 101\nexit 0\n' "$$" > "$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
install() {
    apt-get install --yes --no-install-recommends -o DPkg::Lock::Timeout=120 "$1"
}
# The lists of packages may be missing (as in most images of containers) or too old.
apt-cache show "$1" > /dev/null 2>&1 || apt-get update
install "$1" || { apt-get update && install "$1"; } || exit 1
case "$1" in
*-server)
    # Otherwise the next boot of the machine would start a server that nobody asked for.
    ! command -v systemctl > /dev/null || systemctl disable "$1.service" > /dev/null 2>&1
esac
exit 0
"""


def _install_line(package: str) -> str:
    return f"sudo apt-get install --no-install-recommends {package}"


def _become_root() -> Optional[List[str]]:
    """Return the prefix for a command that needs root; None if the user cannot become root."""
    if os.geteuid() == 0:
        return []
    if shutil.which("sudo") and _run(["sudo", "-n", "true"]).returncode == 0:
        return ["sudo", "-n"]
    return None


@functools.cache
def _can_unshare() -> bool:
    """Return whether a process may have its own mounts here; containers often forbid that."""
    become = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("unshare"):
        return False
    return _run([*become, "unshare", "--mount", "true"]).returncode == 0


def _run(
    command: Sequence[str], timeout: Optional[float] = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        timeout=timeout,
        check=False,
    )


def apt_install(package: str) -> None:
    """Install a Debian package, without starting its service.

    Raises:
        NotAvailable: if that is not possible.
    """
    hint = f"{package} is not installed"
    if not shutil.which("apt-get"):
        raise NotAvailable(f"{hint}, and this system has no apt-get: install it by other means")
    become = _become_root()
    if become is None:
        raise NotAvailable(
            f"{hint}, and you may not install it without a password; run: {_install_line(package)}"
        )
    print(f"Installing the package {package} ...", file=sys.stderr, flush=True)
    done = _run([*become, "sh", "-c", _INSTALL_SCRIPT, "sh", package])
    if done.returncode:
        raise NotAvailable(
            f"{hint}, and apt-get failed; run: {_install_line(package)}\n{done.stdout[-_TAIL:]}"
        )


def apt_archives(*options: str) -> Dict[str, Set[str]]:
    """Return the package archives in apt's configuration with a component ``main``.

    Parameters:
        *options: more options of apt-get.

    Returns:
        The suites by address.
    """
    if not shutil.which("apt-get"):
        return {}
    # Prints what it would fetch, and fetches nothing.
    shown = _run(["apt-get", "update", "--print-uris", *options]).stdout
    found: Dict[str, Set[str]] = {}
    for uri, suite in re.findall(r"^'(\S+)/dists/(\S+)/main/binary-", shown, re.MULTILINE):
        # Debian's cloud images name a file that lists the mirrors.
        listed = re.fullmatch(r"mirror\+file:/*(/.+)", uri)
        uris = [uri.split("+", 1)[1] if "mirror+http" in uri else uri]
        if listed:
            uris = []
            with contextlib.suppress(OSError):
                uris = re.findall(r"^\s*([a-z]+:\S+)", Path(listed[1]).read_text(), re.MULTILINE)
        for address in uris:
            found.setdefault(address.rstrip("/"), set()).add(suite)
    return found


def debian_mirrors(archives: Mapping[str, Set[str]]) -> List[str]:
    """Return the addresses among *archives* that may be a full archive of Debian, best first.

    This is a guess, since an archive does not say so. A wrong guess does no harm: debootstrap
    refuses packages that are not signed with Debian's keys, and the next address is tried.
    """
    scores: Dict[str, int] = {}
    for uri, suites in archives.items():
        if not re.match(r"(https?|file):", uri) or "security" in uri:
            continue
        if not all("security" in suite for suite in suites):
            # Hardly any other distribution has both a release and its updates in one place.
            updates = any(f"{suite}-updates" in suites for suite in suites)
            scores[uri] = 2 * bool(re.search(r"/debian\b", uri)) + updates
    return sorted((uri for uri, score in scores.items() if score), key=lambda uri: -scores[uri])


def _debian_suite(suite: str) -> Distribution:
    if not _SUITE.fullmatch(suite):
        raise NotAvailable(
            f"{suite!r} is no distribution: use 'system', or the name of a Debian suite in lower "
            "case, such as 'forky'"
        )
    folder = cache_folder()
    root = folder / f"rabbitmq-{suite}"
    if not root.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # A concurrent process waits here for the lock and then finds the work done.
        with (folder / f"rabbitmq-{suite}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not root.exists():
                _debootstrap(suite, root)
    return Distribution._in_root(suite, root)


def _debootstrap(suite: str, root: Path) -> None:
    become = _become_root()
    if become is None:
        script = Path(__file__).resolve()
        raise NotAvailable(
            f"RabbitMQ of Debian {suite} has to be put into {root}, for which you have to be root; "
            f"run: sudo env CELERY_AMQP_RESULTS_CACHE={shlex.quote(str(root.parent))} "
            f"python3 {shlex.quote(str(script))} install --distribution {suite}"
        )
    if not shutil.which("debootstrap", path=f"{os.environ.get('PATH', '')}:{_PATH}"):
        apt_install("debootstrap")
    given = os.environ.get("DEBIAN_MIRROR")
    mirrors = [given] if given else debian_mirrors(apt_archives())
    if not mirrors:
        raise NotAvailable(
            "the apt sources of this machine name no archive of Debian: set DEBIAN_MIRROR to the "
            "address of one"
        )
    print(f"Making a Debian {suite} with RabbitMQ in {root} ...", file=sys.stderr, flush=True)
    environment = {"PATH": _PATH, "LANG": "C.UTF-8", **_proxies()}
    output = ""
    unfinished = root.with_name(root.name + ".unfinished")
    for mirror in mirrors:
        _remove_root(unfinished, become)
        # The instructions for sid are right for every future suite.
        command = ["debootstrap", "--variant=minbase", "--include=rabbitmq-server", suite]
        command += [str(unfinished), mirror, "sid"]
        variables = [f"{name}={value}" for name, value in environment.items()]
        done = _run([*become, "/usr/bin/env", "-i", *variables, *command])
        if done.returncode == 0:
            hosts = "printf '127.0.0.1 localhost\\n::1 localhost\\n' > \"$1\""
            _run([*become, "sh", "-c", hosts, "sh", str(unfinished / "etc/hosts")])
            # The downloaded packages are no longer needed.
            _run([*become, _CHROOT, str(unfinished), "/usr/bin/apt-get", "clean"])
            # Within one folder this needs no permission for the renamed folder itself.
            unfinished.rename(root)
            return
        output += f"\n$ {' '.join(command)}\n{done.stdout[-_TAIL:]}"
    _remove_root(unfinished, become)
    raise NotAvailable(f"RabbitMQ of Debian {suite} could not be had:{output}")


def _proxies() -> Dict[str, str]:
    """Return the variables that tell debootstrap which proxies apt uses."""
    found = {}
    for name in ("http", "https"):
        value = os.environ.get(f"{name}_proxy")
        if not value and shutil.which("apt-config"):
            shown = _run(["apt-config", "shell", "P", f"Acquire::{name}::Proxy"]).stdout
            value = "".join(shlex.split(shown)).partition("=")[2]
        if value and value.upper() != "DIRECT":
            found[f"{name}_proxy"] = value
    if os.environ.get("no_proxy"):
        found["no_proxy"] = os.environ["no_proxy"]
    return found


def _remove_root(root: Path, become: Sequence[str]) -> None:
    """Remove the root folder that a killed debootstrap has left, but nothing mounted there."""
    if not root.exists():
        return
    # debootstrap mounts the machine's /proc and /sys there. Neither may be walked into.
    for line in Path("/proc/mounts").read_text().splitlines():
        where = line.split()[1].encode().decode("unicode_escape")
        if where.startswith(f"{root}/"):
            _run([*become, "umount", "--lazy", where])
    _run([*become, "rm", "-rf", "--one-file-system", str(root)])
    if root.exists():
        raise NotAvailable(f"{root} is left over and cannot be removed: remove it by hand")


# -- a node ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files in PEM format for a TLS listener; they are copied to the node."""

    #: Certificates of the authorities that the node trusts.
    ca: Path
    #: The certificate of the node.
    certificate: Path
    #: The private key of the node, without a passphrase.
    key: Path
    #: Whether a client must present a certificate.
    verify_peer: bool = False


class Node:
    """A private RabbitMQ node.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. A node that is never
    stopped ends with the process that created it. A forked child process may use :meth:`url` and
    connect, but must leave starting and stopping the node to its parent. The methods may be called
    from several threads, except that starting and stopping must not overlap.

    Parameters:
        distribution: the RabbitMQ to run; the system's by default.
        name: the part of the node's name before ``@localhost``; random by default.
        plugins: names of plugins to enable, such as ``rabbitmq_management``; none by default.
        config: more lines for ``rabbitmq.conf``; they come last, and so override the others.
        advanced_config: content of ``advanced.config``, an Erlang term; none by default.
        env: more environment variables for the node.
        tls: makes the node listen on :attr:`amqps_port` too.

    Raises:
        ValueError: if *name* or one of *plugins* is invalid.
        NotAvailable: if *distribution* is not given and none is installed.
    """

    def __init__(
        self,
        distribution: Optional[Distribution] = None,
        *,
        name: Optional[str] = None,
        plugins: Sequence[str] = (),
        config: str = "",
        advanced_config: str = "",
        env: Optional[Mapping[str, str]] = None,
        tls: Optional[Tls] = None,
        _home: Optional[_Home] = None,
    ) -> None:
        self.distribution = distribution or Distribution.system()
        self.plugins = tuple(plugins)
        known = self.distribution.plugins() if plugins else []
        for plugin in plugins:
            if plugin not in known:
                near = difflib.get_close_matches(plugin, known, 1)
                raise ValueError(
                    f"RabbitMQ {self.distribution.version} has no plugin {plugin!r}"
                    + (f": did you mean {near[0]!r}?" if near else f", only {', '.join(known)}")
                )
        if name is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(
                f"{name!r} cannot be the name of a node: use letters, digits, '_' and '-' only; "
                "'@localhost' is added"
            )
        #: The node's name, with ``@localhost``.
        self.name = f"{name or 'rabbit-' + secrets.token_hex(4)}@localhost"
        self._config = config
        self._advanced_config = advanced_config
        self._env = dict(env or {})
        self._tls = tls
        self._choose_ports()
        # start() creates a home and stop() removes it; a cluster passes in its own.
        self._shared = _home is not None
        self._home = _home
        self._process: Optional[int] = None
        self._beam: Optional[int] = None

    def __repr__(self) -> str:
        state = f"pid {self._beam}" if self.running else "stopped"
        return f"<Node {self.name}: RabbitMQ {self.version}, port {self.amqp_port}, {state}>"

    def __enter__(self) -> Node:
        if not self.running:
            try:
                self.start()
            except BaseException:
                self.stop()
                raise
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[types.TracebackType],
    ) -> None:
        self.stop()

    # -- facts --

    @property
    def version(self) -> str:
        """Version of RabbitMQ, such as ``3.10.8``."""
        return self.distribution.version

    @property
    def running(self) -> bool:
        """Whether the process of the node exists, even if it is paused."""
        if self._process is None or self._home is None:
            return False
        return self._home.guard.running(self._process)

    @property
    def pid(self) -> int:
        """Process id of the Erlang virtual machine.

        Raises:
            RuntimeError: when the node does not run.
        """
        if self._beam is None or not self.running:
            raise RuntimeError(f"{self!r} does not run: start it")
        return self._beam

    @property
    def log_path(self) -> Path:
        """The log, with everything that the node prints; :meth:`stop` removes it."""
        return self._folder / "rabbit.log"

    def url(
        self, user: str = "guest", password: str = "guest", vhost: str = "/", *, tls: bool = False
    ) -> str:
        """Return the URL for a user and a virtual host; it is final once the node was started.

        Parameters:
            user: name of the user.
            password: password of the user.
            vhost: name of the virtual host.
            tls: whether to return an ``amqps`` URL.
        """
        scheme, port = ("amqps", self.amqps_port) if tls else ("amqp", self.amqp_port)
        user, password = (urllib.parse.quote(part, safe="") for part in (user, password))
        # Celery's convention is to write the default virtual host unquoted.
        path = vhost if vhost == "/" else urllib.parse.quote(vhost, safe="")
        return f"{scheme}://{user}:{password}@127.0.0.1:{port}/{path}"

    @property
    def amqps_port(self) -> int:
        """Port that speaks AMQP over TLS.

        Raises:
            ValueError: when the node was made without *tls*.
        """
        if self._tls is None:
            raise ValueError(f"{self!r} does not speak TLS: pass tls=rabbitmq.Tls(...) to Node")
        return self._tls_port

    @property
    def management_url(self) -> str:
        """URL of the management interface, without user and password.

        Raises:
            ValueError: when the node was made without the plugin.
        """
        if "rabbitmq_management" not in self.plugins:
            raise ValueError(
                f"{self!r} has no management interface: pass plugins=['rabbitmq_management']"
            )
        return f"http://127.0.0.1:{self._management_port}"

    # -- life --

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start the node, with the data of its last run, and return when a client can log in.

        Does nothing if the node is running.

        Parameters:
            timeout: seconds.

        Raises:
            StartError: if it does not answer in time, or exits. It is killed then; data of an
                earlier run is kept.
            NotAvailable: if the distribution does not work here.
        """
        if self.running:
            return
        deadline = time.monotonic() + timeout
        first = not (self._home is not None and self._folder.exists())
        try:
            for attempt in range(1, _PORT_ATTEMPTS + 1):
                self._launch()
                problem = self._problem_until(deadline, timeout)
                if problem is None:
                    return
                self.kill()
                tail = self._log_tail()
                # Another process took the port after the check that it was free. Try others, unless
                # clients know this one already.
                if not (first and "eaddrinuse" in tail and attempt < _PORT_ATTEMPTS):
                    raise StartError(f"{self!r} {problem}; its log ends:\n{tail}")
                self._choose_ports()
                self.log_path.unlink()
        except BaseException:
            self.kill()
            if first:
                self.stop()
            raise

    def stop(self) -> None:
        """Stop the node cleanly, and remove its data and its folder. Calling it twice is harmless.

        A later :meth:`start` creates an empty node on the same port.
        """
        if self._home is None:
            return
        if self._shared:
            self.halt()
            shutil.rmtree(self._folder, ignore_errors=True)
            return
        try:
            self.halt()
        finally:
            self._process = self._beam = None
            home, self._home = self._home, None
            home.close()

    def halt(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop the node cleanly, as an operator would; :meth:`start` continues with its data.

        Parameters:
            timeout: seconds until the node is killed.
        """
        if not self.running:
            return
        # A paused process would not handle the other signal.
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        if not _until(lambda: not self.running, timeout):
            self.kill()

    def kill(self) -> None:
        """Kill the node with SIGKILL, as a crash would; :meth:`start` continues with its data."""

        def gone() -> bool:
            self._signal(signal.SIGKILL)
            return not self.running

        if not _until(gone, _KILL_TIMEOUT):
            raise RuntimeError(f"{self!r} is still there after SIGKILL")

    def restart(self, timeout: float = START_TIMEOUT) -> None:
        """Stop the node cleanly and start it again with its data, on the same port.

        Parameters:
            timeout: seconds until it must answer again.

        Raises:
            StartError: as :meth:`start`.
        """
        self.halt()
        self.start(timeout)

    def pause(self) -> None:
        """Freeze the node (SIGSTOP): its connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Resume a paused node (SIGCONT)."""
        self._signal(signal.SIGCONT)

    # -- commands --

    def ctl(self, *arguments: str, timeout: float = CTL_TIMEOUT) -> str:
        """Run rabbitmqctl for this node and return its output; takes one or two seconds.

        Parameters:
            *arguments: the command and its arguments, such as ``"list_queues", "name"``.
            timeout: seconds.

        Raises:
            CtlError: if the command fails, or takes too long.
        """
        return self._command("rabbitmqctl", "--quiet", *arguments, timeout=timeout)

    def eval(self, expression: str, timeout: float = CTL_TIMEOUT) -> str:
        """Evaluate Erlang on the node and return the value as Erlang prints it, in one line.

        Faster than ``rabbitmqctl eval``, because it skips most of rabbitmqctl.

        Parameters:
            expression: one or more expressions, such as ``"rabbit_vhost:list_names()."``; the last
                full stop is optional.
            timeout: seconds.

        Raises:
            CtlError: if it fails, or takes too long.
        """
        expression = expression.rstrip().rstrip(".") + "."
        name = f"eval-{secrets.token_hex(6)}@localhost"
        return self._command(
            self._erl(),
            *("-noinput", "-hidden", "-sname", name, "-start_epmd", "false"),
            *("-kernel", "inet_dist_use_interface", "{127,0,0,1}"),
            *("-eval", _EVAL, "-extra", self.name, expression),
            timeout=timeout,
        )

    def queue_count(self) -> int:
        """Return the number of queues in all virtual hosts, including those of other nodes."""
        return int(self.eval("rabbit_amqqueue:count()"))

    def memory(self) -> int:
        """Return the resident memory of the Erlang virtual machine, in bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    # -- internals --

    @property
    def _folder(self) -> Path:
        if self._home is None:
            raise RuntimeError(f"{self!r} has no folder: start it")
        return self._home.guard.folder / self.name.partition("@")[0]

    def _choose_ports(self) -> None:
        #: Port that speaks AMQP.
        self.amqp_port: int
        self.amqp_port, self._dist_port, self._management_port, self._tls_port = _free_ports(4)

    def _erl(self) -> str:
        if self.distribution.root != Path("/"):
            return "/usr/bin/erl"
        return shutil.which("erl", path=self._environment()["PATH"]) or "/usr/bin/erl"

    def _environment(self) -> Dict[str, str]:
        assert self._home is not None
        inside = functools.partial(self.distribution.inside)
        folder = self._folder
        path = os.environ.get("PATH", "") if self.distribution.root == Path("/") else ""
        loopback = "-kernel inet_dist_use_interface {127,0,0,1}"
        return {
            "PATH": f"{path}:{_PATH}".lstrip(":"),
            "LANG": "C.UTF-8",
            "HOME": inside(self._home.guard.folder),  # where the cookie is
            "TMPDIR": inside(folder),
            "ERL_EPMD_PORT": str(self._home.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # None: the folder is removed before anyone could read a dump.
            "ERL_CRASH_DUMP_SECONDS": "0",
            "RABBITMQ_NODENAME": self.name,
            "RABBITMQ_DIST_PORT": str(self._dist_port),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": loopback,
            # rabbitmqctl listens too. Concurrent calls would compete for its default ports.
            "RABBITMQ_CTL_ERL_ARGS": loopback,
            "RABBITMQ_CTL_DIST_PORT_MIN": "0",
            "RABBITMQ_CTL_DIST_PORT_MAX": "0",
            "RABBITMQ_MNESIA_BASE": inside(folder / "data"),
            "RABBITMQ_LOG_BASE": inside(folder / "log"),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_PID_FILE": inside(folder / "pid"),
            "RABBITMQ_PLUGINS_EXPAND_DIR": inside(folder / "plugins"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": inside(folder / "enabled_plugins"),
            "RABBITMQ_CONFIG_FILE": inside(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": inside(folder / "advanced.config"),
            # These files do not exist. Otherwise the machine's own would be read.
            "RABBITMQ_CONFIG_FILES": inside(folder / "conf.d/*.conf"),
            "RABBITMQ_CONF_ENV_FILE": inside(folder / "rabbitmq-env.conf"),
            # Makes the script replace itself with the Erlang virtual machine.
            "RUNNING_UNDER_SYSTEMD": "true",
            **self._env,
        }

    def _configuration(self) -> str:
        lines = [
            f"listeners.tcp.1 = 127.0.0.1:{self.amqp_port}",
            # The defaults depend on the machine, and block publishers silently.
            "disk_free_limit.absolute = 50MB",
            f"vm_memory_high_watermark.absolute = {_total_memory() * 4 // 5}",
            # A changed root has no /proc to read these from.
            f"total_memory_available_override_value = {_total_memory()}",
            "vm_memory_calculation_strategy = allocated",
        ]
        if "rabbitmq_management" in self.plugins:
            lines += [
                "management.tcp.ip = 127.0.0.1",
                f"management.tcp.port = {self._management_port}",
            ]
        if self._tls is not None:
            certificates = self.distribution.inside(self._folder)
            peer = self._tls.verify_peer
            lines += [
                f"listeners.ssl.1 = 127.0.0.1:{self._tls_port}",
                *(f"ssl_options.{name}file = {certificates}/{name}.pem" for name in _PEM),
                f"ssl_options.verify = {'verify_peer' if peer else 'verify_none'}",
                f"ssl_options.fail_if_no_peer_cert = {'true' if peer else 'false'}",
            ]
        return "\n".join(lines) + f"\n{self._config}\n"

    def _launch(self) -> None:
        if self._home is None:
            self._home = _Home(self.distribution)
        folder = self._folder
        folder.mkdir(exist_ok=True)
        (folder / "rabbitmq.conf").write_text(self._configuration())
        # Without this file the machine's own plugins would be enabled.
        (folder / "enabled_plugins").write_text(f"[{','.join(self.plugins)}].\n")
        if self._advanced_config:
            (folder / "advanced.config").write_text(self._advanced_config)
        if self._tls is not None:
            for name, source in zip(_PEM, (self._tls.ca, self._tls.certificate, self._tls.key)):
                shutil.copyfile(source, folder / f"{name}.pem")
        self._beam = None
        self._process = self._home.guard.spawn(
            self.distribution.command("rabbitmq-server", env=self._environment()), self.log_path
        )

    def _problem_until(self, deadline: float, timeout: float) -> Optional[str]:
        """Wait for the node to answer; return the problem, or None."""
        assert self._home is not None
        assert self._process is not None
        # Each listener starts at its own time.
        ports = [self._management_port] if "rabbitmq_management" in self.plugins else []
        ports += [self._tls_port] if self._tls is not None else []
        while not (_amqp_answers(self.amqp_port) and all(map(_port_answers, ports))):
            if not self.running:
                return "ended while it started"
            if time.monotonic() >= deadline:
                return f"did not answer within {timeout:g} s"
            time.sleep(_POLL)
        # A different process may have answered, on a port that this node could not bind.
        self._beam = self._home.guard.find_beam(self._process)
        return None if self._beam is not None else "has no Erlang process"

    def _log_tail(self) -> str:
        try:
            return self.log_path.read_text(errors="replace")[-_TAIL:].strip() or "(empty)"
        except OSError as exc:
            return f"(cannot be read: {exc})"

    def _signal(self, number: int) -> None:
        if self._home is not None and self._process is not None:
            self._home.guard.signal(self._process, number)

    def _command(self, *command: str, timeout: float) -> str:
        if self._home is None:
            raise RuntimeError(f"{self!r} does not run: start it")
        line = self.distribution.command(*command, env=self._environment())
        shown = " ".join(command[:1] + command[-2:])
        guard = self._home.guard
        # The guard runs it, not this process: helpers that Erlang leaves behind would otherwise be
        # adopted by the machine's init, and a container's init may not reap them.
        with tempfile.TemporaryDirectory(prefix="ctl-", dir=guard.folder) as folder:
            output, errors = Path(folder, "output"), Path(folder, "errors")
            process = guard.spawn(line, output, errors)
            if not _until(lambda: not guard.running(process), timeout):
                guard.signal(process, signal.SIGKILL)
                raise CtlError(f"{shown!r} on {self!r} took longer than {timeout:g} s")
            printed = output.read_text(errors="replace").strip()
            code = guard.exit_code(process)
            if code != 0:
                problem = errors.read_text(errors="replace").strip()
                raise CtlError(f"{shown!r} on {self!r} failed ({code}): {printed}{problem}")
            return printed


_PEM = ("cacert", "cert", "key")

#: Takes the node's name and the expressions from the command line.
_EVAL = """
    [Name, Text] = init:get_plain_arguments(),
    Say = fun(Format, Term) ->
        io:put_chars(unicode:characters_to_binary(io_lib:format(Format, [Term])))
    end,
    Code = try
        {ok, Tokens, _} = erl_scan:string(Text),
        {ok, Parsed} = erl_parse:parse_exprs(Tokens),
        case rpc:call(list_to_atom(Name), erl_eval, exprs, [Parsed, []]) of
            {value, Value, _} -> Say("~0tp~n", Value), 0;
            Problem -> Say("~tp~n", Problem), 1
        end
    catch _:Reason -> Say("~tp~n", Reason), 1
    end,
    halt(Code).
"""


class Cluster:
    """Several private nodes that form one cluster, and share an epmd and a cookie.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`. To take one node away and
    bring it back, use its :meth:`Node.halt` or :meth:`Node.kill`, and :meth:`Node.start`.

    Parameters:
        distribution: the RabbitMQ to run; the system's by default.
        size: the number of nodes.
        config: more lines for each ``rabbitmq.conf``.
        **options: more parameters of :class:`Node`, the same for all nodes.

    Raises:
        ValueError: if *size* is not positive, or a parameter of the nodes is invalid.
    """

    def __init__(
        self,
        distribution: Optional[Distribution] = None,
        size: int = 3,
        *,
        config: str = "",
        **options: Any,
    ) -> None:
        if size < 1:
            raise ValueError(f"a cluster of {size} nodes cannot be: use a size of 1 or more")
        self.distribution = distribution or Distribution.system()
        self._size = size
        self._config = config
        self._options = options
        self._home: Optional[_Home] = None
        #: The nodes; empty while the cluster is stopped.
        self.nodes: List[Node] = []

    def __repr__(self) -> str:
        return f"<Cluster of {self._size}: RabbitMQ {self.distribution.version}, {self.nodes}>"

    def urls(self) -> List[str]:
        """Return the URL of each node."""
        return [node.url() for node in self.nodes]

    def start(self, timeout: float = START_TIMEOUT) -> None:
        """Start the nodes and return when they form a cluster and clients can log in to each.

        Parameters:
            timeout: seconds, for the first node and again for all others.

        Raises:
            StartError: if a node does not start, or does not join. All nodes are gone then.
        """
        if self.nodes:
            return
        self._home = _Home(self.distribution)
        try:
            self._form(self._home, timeout)
        except BaseException:
            self.stop()
            raise

    def _form(self, home: _Home, timeout: float) -> None:
        names = [f"rabbit{number}" for number in range(1, self._size + 1)]
        # The others find the first one running. If all started at once, each could find no
        # cluster and create one.
        for name in names:
            members = dict.fromkeys([names[0], name])
            discovery = "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
                f"cluster_formation.classic_config.nodes.{number} = {member}@localhost\n"
                for number, member in enumerate(members, 1)
            )
            config = f"{discovery if len(members) > 1 else ''}{self._config}"
            node = Node(self.distribution, name=name, config=config, _home=home, **self._options)
            self.nodes.append(node)
        first, *others = self.nodes
        first.start(timeout)
        with concurrent.futures.ThreadPoolExecutor(max(1, len(others))) as pool:
            for started in [pool.submit(node.start, timeout) for node in others]:
                started.result()
        members_now = first.eval(
            "case erlang:function_exported(rabbit_nodes, list_running, 0) of"
            " true -> rabbit_nodes:list_running(); false -> rabbit_nodes:all_running() end"
        )
        missing = [node for node in self.nodes if f"{node.name}" not in members_now]
        if missing:
            raise StartError(
                f"{missing} did not join: the cluster is {members_now}; the log of the first ends:"
                f"\n{missing[0]._log_tail()}"
            )

    def stop(self) -> None:
        """Stop all nodes and remove their folder. Calling it twice is harmless."""
        home, self._home = self._home, None
        nodes, self.nodes = self.nodes, []
        if home is None:
            return
        try:
            # The data is removed anyway, so a clean shutdown is unnecessary. It would also make
            # each node hand over to the ones that are stopped next.
            for node in nodes:
                node.kill()
        finally:
            home.close()

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        value: Optional[BaseException],
        trace: Optional[types.TracebackType],
    ) -> None:
        self.stop()


# -- ports and protocols ---------------------------------------------------------------------------


def _free_ports(count: int) -> List[int]:
    """Return ports of 127.0.0.1 that were free a moment ago.

    They are outside the kernel's range of client ports. While a node is down for a restart, a
    client that keeps connecting to such a port could be given that same port as its own. It would
    then be connected to itself, and the node could not come back.
    """
    low = 32768
    with contextlib.suppress(OSError, ValueError):
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    # If nearly all ports are client ports, any port is as good as another.
    candidates = range(10000, low) if low > 11000 else range(10000, 65536)
    with contextlib.ExitStack() as stack:
        found: List[int] = []
        for port in random.SystemRandom().sample(candidates, min(len(candidates), 1000)):
            one = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise RuntimeError(f"no {count} free ports from {candidates[0]} to {candidates[-1]}")


def _port_answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1.0).close()
    except OSError:
        return False
    return True


#: Client properties {"capabilities": {"authentication_failure_close": true}}: the node then reports
#: that it refuses a user instead of closing the connection after a second.
_CAPABILITY = b"\x1cauthentication_failure_closet\x01"
_PROPERTIES = b"\x0ccapabilitiesF" + struct.pack(">I", len(_CAPABILITY)) + _CAPABILITY


def _amqp_answers(port: int, timeout: float = 5.0) -> bool:
    """Return whether a node on *port* of 127.0.0.1 accepts logins, or refuses them permanently.

    An open port is not enough: it may open before the default virtual host exists.
    """
    try:
        with socket.create_connection(("127.0.0.1", port), timeout) as one:
            one.settimeout(timeout)
            stream = one.makefile("rb")

            def receive() -> Tuple[int, int, bytes]:
                kind, _, size = struct.unpack(">BHI", stream.read(7))
                payload = stream.read(size + 1)
                if kind != 1:
                    raise ValueError("not a method")
                return (*struct.unpack(">HH", payload[:4]), payload[4:-1])

            def send(class_id: int, method_id: int, arguments: bytes) -> None:
                payload = struct.pack(">HH", class_id, method_id) + arguments
                one.sendall(struct.pack(">BHI", 1, 0, len(payload)) + payload + b"\xce")

            def short(text: bytes) -> bytes:
                return bytes([len(text)]) + text

            def long(text: bytes) -> bytes:
                return struct.pack(">I", len(text)) + text

            one.sendall(b"AMQP\x00\x00\x09\x01")
            if receive()[:2] != (10, 10):  # Connection.Start
                return False
            answer = long(_PROPERTIES) + short(b"PLAIN") + long(b"\x00guest\x00guest")
            send(10, 11, answer + short(b"en_US"))
            class_id, method_id, arguments = receive()
            if (class_id, method_id) == (10, 30):  # Connection.Tune
                send(10, 31, arguments)
                send(10, 40, short(b"/") + short(b"") + b"\x00")
                class_id, method_id, arguments = receive()
            if (class_id, method_id) == (10, 50):  # Connection.Close
                # A node with another default user or virtual host works as well: ACCESS_REFUSED,
                # NOT_ALLOWED.
                return bool(struct.unpack(">H", arguments[:2])[0] in (403, 530))
            if (class_id, method_id) != (10, 41):  # Connection.OpenOk
                return False
            send(10, 50, struct.pack(">H", 200) + short(b"") + struct.pack(">HH", 0, 0))
            receive()
            return True
    except (OSError, ValueError, struct.error):
        return False


def _until(condition: Callable[[], bool], timeout: float) -> bool:
    """Wait until *condition* is true, at most *timeout* seconds; return whether it is."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL)
    return True


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# -- the guard -------------------------------------------------------------------------------------


class _Home:
    """The shared parts of a cluster's nodes: a guard with its folder, a cookie, an epmd."""

    def __init__(self, made_of: Distribution) -> None:
        # In a changed root, nodes see only folders below that root.
        base = tempfile.gettempdir() if made_of.root == Path("/") else str(made_of.root / "tmp")
        self.guard = _Guard(base)
        try:
            cookie = self.guard.folder / ".erlang.cookie"
            cookie.write_text(secrets.token_hex(16))
            cookie.chmod(0o400)
            self.epmd_port = self._start_epmd(made_of)
        except BaseException:
            self.close()
            raise

    def _start_epmd(self, made_of: Distribution) -> int:
        path = os.environ.get("PATH", "") if made_of.root == Path("/") else ""
        program = shutil.which("epmd", path=f"{path}:{_PATH}") if path else None
        log = self.guard.folder / "epmd.log"
        for _ in range(_PORT_ATTEMPTS):
            (port,) = _free_ports(1)
            options = ("-address", "127.0.0.1", "-port", str(port))
            command = made_of.command(program or "/usr/bin/epmd", *options, env={"PATH": _PATH})
            process = self.guard.spawn(command, log)
            alive = functools.partial(self.guard.running, process)
            if _until(lambda: _port_answers(port) or not alive(), 10.0) and alive():  # noqa: B023
                return port
            # It exits if the port is taken.
        raise StartError(f"epmd does not start; it says:\n{log.read_text(errors='replace')}")

    def close(self) -> None:
        self.guard.close()


class _GuardGone(RuntimeError):
    """Raised when a guard does not answer."""


class _Guard:
    """The owner's side of a guard process. Thread-safe.

    A guard that is never closed is closed at interpreter exit.
    """

    def __init__(self, base: str) -> None:
        self._lock = threading.Lock()
        self._number = 0
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", os.path.abspath(__file__), _GUARD, str(os.getpid()), base],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._close = weakref.finalize(self, _close_guard, self._process, os.getpid())
        try:
            self.folder = Path(self._ask("folder"))
        except BaseException:
            self._close()
            raise

    def spawn(self, command: Sequence[str], output: Path, errors: Optional[Path] = None) -> int:
        """Start a process that appends its output to files; return its process id."""
        return int(self._ask("spawn", list(command), str(output), str(errors or output)))

    def running(self, pid: int) -> bool:
        """Return whether a spawned process exists."""
        try:
            return self._close.alive and bool(self._ask("running", pid))
        except _GuardGone:
            return False  # It goes with the guard.

    def exit_code(self, pid: int) -> Optional[int]:
        """Return the exit code of a spawned process; None while it runs."""
        code = self._ask("exit_code", pid)
        return None if code is None else int(code)

    def signal(self, pid: int, number: int) -> None:
        """Signal the Erlang process of a spawned process; does nothing if it is gone."""
        if self.running(pid):
            self._ask("signal", pid, int(number))

    def find_beam(self, pid: int) -> Optional[int]:
        """Return the Erlang process among a spawned process and its descendants."""
        found = self._ask("find_beam", pid)
        return None if found is None else int(found)

    def close(self) -> None:
        """Kill all processes, remove the folder and end the guard. Calling it twice is harmless."""
        self._close()
        # The folder still exists only if the guard itself was killed.
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ask(self, question: str, *arguments: Any) -> Any:
        with self._lock:
            self._number += 1
            stdin, stdout = self._process.stdin, self._process.stdout
            assert stdin is not None
            assert stdout is not None
            try:
                stdin.write(json.dumps([self._number, question, arguments]).encode() + b"\n")
                stdin.flush()
                number, answer, problem = 0, None, ""
                # After an interrupt an unread answer may be left in the pipe.
                while number != self._number:
                    number, answer, problem = json.loads(stdout.readline())
            except (OSError, ValueError) as exc:
                raise _GuardGone(
                    "the process that looks after the RabbitMQ nodes was killed, and they with it: "
                    "call stop() before you start them anew"
                ) from exc
        if problem:
            raise RuntimeError(problem)
        return answer


def _close_guard(process: subprocess.Popen[bytes], owner: int) -> None:
    # A forked child has a copy of this object, but the guard belongs to its parent.
    if os.getpid() != owner:
        process.returncode = 0  # Spares the child a warning that the process still runs.
        return
    assert process.stdin is not None
    assert process.stdout is not None
    # The guard exits at the end of its input, but a forked child may hold the pipe open.
    with contextlib.suppress(OSError):
        process.terminate()
    with contextlib.suppress(OSError):
        process.stdin.close()
    process.stdout.close()
    try:
        process.wait(2 * _KILL_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


#: First argument that makes this file the program of a guard.
_GUARD = "_guard"

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


class _GuardProcess:
    """The guard's side: executes commands until its owner is gone or it is terminated."""

    def __init__(self, owner: int, base: str) -> None:
        self._owner = owner
        # Orphans of its children become children of the guard, which can then kill them: a process
        # can leave its group or session, but not this.
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._folder = tempfile.mkdtemp(prefix="rabbitmq-", dir=base)
        #: Kept because a garbage-collected Popen reaps its process, and the guard must do that.
        self._spawned: List[subprocess.Popen[bytes]] = []
        self._children: Set[int] = set()
        #: Exit codes of finished processes, negative for a signal.
        self._ended: Dict[int, int] = {}

    def run(self) -> None:
        try:
            for line in self._lines():
                number, question, arguments = json.loads(line)
                answer, problem = None, ""
                try:
                    answer = getattr(self, f"on_{question}")(*arguments)
                except Exception as exc:
                    problem = f"{type(exc).__name__}: {exc}"
                os.write(1, json.dumps([number, answer, problem]).encode() + b"\n")
        finally:
            # From here on nothing should interrupt.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._end_all()
            shutil.rmtree(self._folder, ignore_errors=True)

    def _lines(self) -> Iterator[bytes]:
        buffer = b""
        # The end of the input is not sufficient: a forked child of the owner may hold the pipe
        # open.
        while os.getppid() == self._owner:
            self._reap()
            if not select.select([0], [], [], _GUARD_POLL)[0]:
                continue
            data = os.read(0, 65536)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                self._reap()
                yield line

    def on_folder(self) -> str:
        return self._folder

    def on_spawn(self, command: List[str], output: str, errors: str) -> int:
        as_root = command[0] == "sudo"
        pid_path = Path(self._folder, "sudo.pid")
        if as_root:
            # If sudo stayed the parent, it would stop together with a paused process, and being
            # root's, it could not be resumed. The script detaches the process, which becomes a
            # child of the guard.
            script = f'"$@" & echo $! > {shlex.quote(str(pid_path))}'
            command = [*command[:2], "sh", "-c", script, "sh", *command[2:]]
        with open(output, "ab") as stdout, open(errors, "ab") as stderr:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                cwd=self._folder,
                # In case the guard itself is killed.
                preexec_fn=functools.partial(_prctl, _PR_SET_PDEATHSIG, signal.SIGKILL),
            )
        self._spawned.append(child)
        pid = child.pid
        if as_root:
            if child.wait() != 0:
                raise RuntimeError(f"sudo failed: {Path(errors).read_text(errors='replace')}")
            pid = int(pid_path.read_text())
        self._children.add(pid)
        self._ended.pop(pid, None)  # An earlier process may have had this number.
        return pid

    def on_running(self, pid: int) -> bool:
        return pid in self._children and pid not in self._ended

    def on_exit_code(self, pid: int) -> Optional[int]:
        return self._ended.get(pid)

    def on_signal(self, pid: int, number: int) -> None:
        # Only the guard reaps, so a pid that exists still belongs to that process.
        if self.on_running(pid):
            beam = self.on_find_beam(pid)
            for target in [beam] if beam is not None else [pid, *_descendants(pid)]:
                # The process may still be root's; the caller tries again.
                with contextlib.suppress(OSError):
                    os.kill(target, number)

    def on_find_beam(self, pid: int) -> Optional[int]:
        if not self.on_running(pid):
            return None
        for candidate in (pid, *_descendants(pid)):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{candidate}/comm").read_text().startswith("beam"):
                    return candidate
        return None

    def _reap(self) -> bool:
        """Reap finished processes; return whether any process is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid in self._children:
                    self._ended[pid] = os.waitstatus_to_exitcode(status)
        return False

    def _end_all(self) -> None:
        deadline = time.monotonic() + _KILL_TIMEOUT
        while self._reap() and time.monotonic() < deadline:
            for pid in _descendants(os.getpid()):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.005)


def _descendants(pid: int) -> List[int]:
    """Return the children of a process, their children and so on."""
    children: Dict[int, List[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The name of a command may contain blanks and parentheses.
                parent = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1]
                children.setdefault(int(parent), []).append(int(entry))
    found: List[int] = []
    todo = [pid]
    while todo:
        todo += children.get(todo[0], [])
        found += children.get(todo.pop(0), [])
    return found


def _guard_main(owner: int, base: str) -> None:
    def end(number: int, frame: Optional[types.FrameType]) -> NoReturn:
        raise SystemExit

    signal.signal(signal.SIGTERM, end)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _GuardProcess(owner, base).run()


# -- the command line ------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rabbitmq.py",
        description="Runs private RabbitMQ nodes: with a name, ports and a folder of their own, on "
        "127.0.0.1 only. A broker that is there already is not touched.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    made_of = argparse.ArgumentParser(add_help=False)
    made_of.add_argument(
        "--distribution",
        default=os.environ.get("RABBITMQ_DISTRIBUTION") or "system",
        metavar="NAME",
        help="'system' for the package of this machine, or a Debian suite such as 'forky' for the "
        "RabbitMQ of that one, in a folder of the cache (default: %(default)s)",
    )
    nodes = argparse.ArgumentParser(add_help=False)
    nodes.add_argument(
        "--cluster",
        type=_positive,
        default=1,
        metavar="N",
        help="make a cluster of so many nodes (default: %(default)s)",
    )
    nodes.add_argument(
        "--plugins",
        default="",
        metavar="A,B",
        help="plugins to enable, such as rabbitmq_management",
    )
    run = actions.add_parser(
        "run",
        parents=[made_of, nodes],
        usage="%(prog)s [options] -- COMMAND [ARGUMENT ...]",
        help="run a command with a node, which ends with it",
        description="Runs a command and returns its exit code. AMQP_URL is the address of the node "
        "then, AMQP_URLS those of all nodes separated by ';', and RABBITMQ_VERSION the version.",
    )
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command")
    actions.add_parser(
        "start",
        parents=[made_of, nodes],
        help="run a node until Ctrl-C",
        description="Prints the address of the node (one a line for a cluster), and runs it until "
        "Ctrl-C or SIGTERM.",
    )
    actions.add_parser(
        "install",
        parents=[made_of],
        help="install RabbitMQ, if it is not here, without starting its service",
    )
    actions.add_parser("list", help="list the distributions that are here")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


@contextlib.contextmanager
def _nodes(options: argparse.Namespace) -> Iterator[List[Node]]:
    ensure_installed(options.distribution)
    made_of = distribution(options.distribution)
    plugins = [name for name in options.plugins.split(",") if name]
    if options.cluster > 1:
        with Cluster(made_of, options.cluster, plugins=plugins) as cluster:
            yield cluster.nodes
    else:
        with Node(made_of, plugins=plugins) as node:
            yield [node]


def _run_command(command: Sequence[str], nodes: Sequence[Node]) -> int:
    urls = [node.url() for node in nodes]
    environment = dict(
        os.environ, AMQP_URL=urls[0], AMQP_URLS=";".join(urls), RABBITMQ_VERSION=nodes[0].version
    )
    # Ctrl-C reaches the command too, and the command decides when it is done. Unlike SIG_IGN, a
    # handler is not inherited by the command.
    signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        process = subprocess.Popen(command, env=environment)
    except OSError as exc:
        print(f"rabbitmq.py: cannot run {command[0]!r}: {exc.strerror}", file=sys.stderr)
        return 127
    try:
        code = process.wait()
    except SystemExit:
        process.terminate()
        code = process.wait()
    return code if code >= 0 else 128 - code


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Run the command line.

    Parameters:
        arguments: instead of those of the process.

    Returns:
        The exit code: that of the command for ``run``, and 2 for what has not worked.
    """
    parser = _parser()
    options = parser.parse_args(arguments)

    def end(number: int, frame: Optional[types.FrameType]) -> NoReturn:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGHUP, end)
    try:
        if options.action == "list":
            for name in available():
                print(f"{name}\t{distribution(name).version}")
            return 0
        if options.action == "install":
            ensure_installed(options.distribution)
            print(f"RabbitMQ {distribution(options.distribution).version}")
            return 0
        if options.action == "run":
            command = options.command[options.command[:1] == ["--"] :]
            if not command:
                parser.error("run needs a command, after --")
        with _nodes(options) as nodes:
            if options.action == "run":
                return _run_command(command, nodes)
            for node in nodes:
                print(node.url(), flush=True)
                if "rabbitmq_management" in node.plugins:
                    print(f"{node.management_url} (guest, guest)", flush=True)
            with contextlib.suppress(KeyboardInterrupt):
                signal.pause()
            return 0
    except (NotAvailable, StartError, ValueError) as exc:
        print(f"rabbitmq.py: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == [_GUARD]:
        _guard_main(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main())
