"""Looking up while another process declares the shards."""

from __future__ import annotations

import threading
import uuid

from tests.conftest import Apps

ROUNDS = 30


def test_a_look_up_is_answered_while_its_shard_is_being_declared(
    make_app: Apps,
) -> None:
    # A fence that is published before the queue exists is lost. If the queue exists when the
    # reader consumes, the reader would wait for that fence until lookup_timeout: once in about
    # 15 rounds.
    for _ in range(ROUNDS):
        name = f"{make_app.prefix}-{uuid.uuid4().hex[:8]}"
        options = {"shards": 4, "lookup_timeout": 30}
        writer, reader = (
            make_app(result_exchange=name, result_backend_transport_options=options)
            for _ in range(2)
        )
        ids = [uuid.uuid4().hex for _ in range(8)]
        # Given an exchange, and no shards
        writer.backend.store_result(uuid.uuid4().hex, 1, "SUCCESS")

        # When one process stores results in all shards
        def store(app=writer, ids=ids) -> None:  # type: ignore[no-untyped-def]
            for task_id in ids:
                app.backend.store_result(task_id, 1, "SUCCESS")

        thread = threading.Thread(target=store)
        thread.start()
        try:
            # Then another process that looks them up meanwhile gets its answers in time
            while thread.is_alive():
                for task_id in ids:
                    reader.backend.task_result_exists(task_id)
        finally:
            thread.join()
            clean_up(writer, name)
        for app in (writer, reader):
            app.backend.close()


def clean_up(app, name: str) -> None:  # type: ignore[no-untyped-def]
    with app.connection_for_write() as connection:
        channel = connection.channel()
        for shard in range(4):
            channel.queue_delete(f"{name}.shard.{shard}")
        channel.exchange_delete(f"{name}.states")
