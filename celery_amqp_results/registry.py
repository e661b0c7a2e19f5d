"""The layouts of the backends of each app, and what happens to them at a fork and at the end.

Equal backends of an app share a layout, and so its connections. It may import ``layouts``,
``config`` and what is below them.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import Callable, Dict, Hashable, Protocol

from celery import signals

from celery_amqp_results.config import BackendConfig
from celery_amqp_results.layouts import Layout, make_layout
from celery_amqp_results.library_types import App
from celery_amqp_results.metrics import Metrics
from celery_amqp_results.toolkit.forks import Process

__all__ = ("LayoutRegistry", "OwnLayout")


class Resettable(Protocol):
    """Something that belongs to one process."""

    def reset(self) -> None:
        """Start afresh, like a new process that has opened nothing."""


class LayoutRegistry:
    """The layouts in use by the backends of one app. Equal backends share one.

    Celery makes a new backend for each result object that is unpickled, and may make two when two
    threads ask for one at the same time. They share connections instead of opening their own.

    Thread-safe. In a forked child it is empty: the parent's connections are dropped without closing
    them.
    """

    def __init__(self) -> None:
        self._parts: weakref.WeakSet[Resettable] = weakref.WeakSet()
        self.reset()

    def reset(self) -> None:
        """Start afresh, as a new process that has opened nothing."""
        self._process = Process()
        self._lock = threading.Lock()
        self._layouts: Dict[Hashable, Layout] = {}
        #: The counts of layouts that were closed.
        self._past: Dict[Hashable, Metrics] = {}
        for part in list(self._parts):
            part.reset()

    def add_parts(self, *parts: Resettable) -> None:
        """Reset *parts* after a fork as well. They are not kept alive."""
        self._parts.update(parts)

    def get(self, key: Hashable, make: Callable[[], Layout]) -> Layout:
        """Return the layout for *key*; *make* makes it if there is none."""
        self._notice_fork()
        layout = self._layouts.get(key)
        if layout is None:
            with self._lock:
                layout = self._layouts.get(key)
                if layout is None:
                    layout = self._layouts[key] = make()
        return layout

    def close_one(self, key: Hashable) -> None:
        """Close the layout for *key*, if there is one, and keep its counts."""
        with self._lock:
            layout = self._layouts.pop(key, None)
            if layout is not None:
                self._past[key] = self._total(key, layout.metrics().counters())
        if layout is not None:
            layout.close()

    def metrics(self, key: Hashable) -> Metrics:
        """Return the counts of the layouts for *key* in this process."""
        self._notice_fork()
        with self._lock:
            layout = self._layouts.get(key)
            return self._total(key, Metrics() if layout is None else layout.metrics())

    def _total(self, key: Hashable, now: Metrics) -> Metrics:
        return Metrics.total((self._past.get(key, Metrics()), now))

    def close(self, wait: bool = True) -> None:
        """Close all layouts, unless they are another process's."""
        if not self._process.is_current:
            return
        with self._lock:
            layouts, self._layouts = list(self._layouts.values()), {}
        for layout in layouts:
            layout.close(wait)

    def _notice_fork(self) -> None:
        if not self._process.is_current:
            # Forked by something that does not run Python's hooks.
            self.reset()


class OwnLayout:
    """The layout of one backend, as this process has it. Calling it returns the layout.

    Thread-safe. Making it and the layout does no I/O.
    """

    def __init__(self, app: App, config: BackendConfig) -> None:
        self._app = app
        self._config = config
        self._registry = _registry_of(app)
        self._key = config.layout_key

    def __call__(self) -> Layout:
        """Return the layout of this process."""
        return self._registry.get(self._key, lambda: make_layout(self._app, self._config))

    def reset_after_fork(self, *parts: Resettable) -> None:
        """Reset *parts*, which are not kept alive, in a child that is forked."""
        self._registry.add_parts(*parts)

    def metrics(self) -> Metrics:
        """Return the counts of this process, also of layouts that were closed."""
        return self._registry.metrics(self._key)

    def close(self) -> None:
        """Close the layout, which equal backends share. The next call makes another one."""
        self._registry.close_one(self._key)


_registries: weakref.WeakKeyDictionary[App, LayoutRegistry] = weakref.WeakKeyDictionary()
_registries_lock = threading.Lock()


def _registry_of(app: App) -> LayoutRegistry:
    """Return the layouts of the backends of *app*; they are closed when the app is gone."""
    with _registries_lock:
        registry = _registries.get(app)
        if registry is None:
            registry = _registries[app] = LayoutRegistry()
            weakref.finalize(app, registry.close, wait=False).atexit = False
        return registry


def _after_fork_in_child() -> None:
    # Dropped without closing: the sockets are the parent's.
    global _registries_lock
    _registries_lock = threading.Lock()
    for registry in list(_registries.values()):
        registry.reset()


def _at_end_of_process(**kwargs: object) -> None:
    for registry in list(_registries.values()):
        registry.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_at_end_of_process)
# A child of a pool ends without running Python's exit functions.
signals.worker_process_shutdown.connect(_at_end_of_process, weak=False)
