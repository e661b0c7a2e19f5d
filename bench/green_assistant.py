"""An assistant whose threads are greenlets of gevent."""

from __future__ import annotations

from gevent import monkey

monkey.patch_all()

from bench import assistant  # noqa: E402

if __name__ == "__main__":
    assistant.serve(assistant.Server)
