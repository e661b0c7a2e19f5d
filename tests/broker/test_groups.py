"""Groups: joining, iterating, saving and restoring."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any, Callable, Dict, List, Tuple

import pytest
from celery import Celery, states
from celery.exceptions import TimeoutError
from celery.result import GroupResult, ResultSet

from tests import subprocess_jobs, subprocesses
from tests.broker.helpers import LONG, Waiting, new_id
from tests.conftest import Apps


def make_group(app: Celery, size: int) -> GroupResult:
    return GroupResult(new_id(), [app.AsyncResult(new_id()) for _ in range(size)], app=app)


def succeed(app: Celery, group: ResultSet) -> None:
    for number, node in enumerate(group):
        app.backend.store_result(node.id, number, states.SUCCESS)


def test_a_finished_group_returns_its_results_in_order(app: Celery, make_app: Apps) -> None:
    group = make_group(app, 50)
    for number, node in reversed(list(enumerate(group))):
        app.backend.store_result(node.id, number, states.SUCCESS)
    assert group.get(timeout=LONG) == list(range(50))
    reader = make_app()
    again = GroupResult(group.id, [reader.AsyncResult(n.id) for n in group], app=reader)
    assert again.join(timeout=LONG) == again.join_native(timeout=LONG) == list(range(50))


def test_results_of_a_group_are_pushed_to_its_waiter(
    app: Celery, make_app: Apps, eventually: Callable[..., Any]
) -> None:
    group, worker = make_group(app, 50), make_app()
    waiting = Waiting(lambda: group.get(timeout=LONG))
    eventually(lambda: app.backend.layout.inbox.covers(group[-1].id))
    succeed(worker, group)
    assert waiting.result() == list(range(50))


def test_a_group_of_a_thousand_is_joined(app: Celery, make_app: Apps) -> None:
    group = make_group(app, 1000)
    waiting = Waiting(lambda: group.get(timeout=LONG))
    succeed(make_app(), group)
    assert waiting.result() == list(range(1000))


def test_ten_thousand_results_of_another_sender_are_joined_in_little_memory(
    make_app: Apps, app: Celery
) -> None:
    writer = make_app(result_backend_transport_options={"shards": 8, "confirm": False})
    group = make_group(app, 10_000)
    for number, node in enumerate(group):
        writer.backend.store_result(node.id, [number, "x" * 1000], states.SUCCESS)
    writer.backend.close()
    joined: Dict[str, int] = {}
    tracemalloc.start()
    try:
        group.get(timeout=LONG, callback=lambda task_id, value: joined.update({task_id: value[0]}))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [joined[node.id] for node in group] == list(range(10_000))
    # The results are 10 MB. Celery keeps them in the group; the backend must not add a copy.
    assert most < 60_000_000
    assert app.backend.layout.inbox.waited_for == 0


@pytest.mark.parametrize("kind", [ResultSet, GroupResult])
def test_an_empty_group_is_ready(app: Celery, kind: Any) -> None:
    empty = kind(results=[], app=app)
    assert empty.get(timeout=LONG) == []
    assert empty.join(timeout=LONG) == []
    assert empty.join_native(timeout=LONG) == []
    assert list(empty.iter_native(timeout=LONG)) == []
    assert list(app.backend.get_many([], timeout=LONG)) == []


@pytest.mark.parametrize("timeout", [0, 0.2])
def test_waiting_for_an_unfinished_group_times_out(app: Celery, timeout: float) -> None:
    group = make_group(app, 3)
    app.backend.store_result(group[0].id, 1, states.SUCCESS)
    begun = time.monotonic()
    # A busy broker may not have reported in time that one is ready.
    with pytest.raises(TimeoutError, match=r"[23] of 3" if timeout else "2 of 3"):
        group.get(timeout=timeout)
    assert timeout <= time.monotonic() - begun < LONG


def test_the_timeout_of_a_group_covers_all_members_together(app: Celery, make_app: Apps) -> None:
    # Given members that finish one by one, at intervals shorter than the timeout.
    group, worker = make_group(app, 1000), make_app()

    def produce() -> None:
        for node in group:
            time.sleep(0.1)
            if waiting.error is not None:
                return
            worker.backend.store_result(node.id, 1, states.SUCCESS)

    waiting = Waiting(lambda: group.get(timeout=0.8))
    producing = Waiting(produce)
    with pytest.raises(TimeoutError):
        waiting.result()
    producing.result()


def test_a_failed_member_raises_without_waiting_for_the_others(app: Celery) -> None:
    group = make_group(app, 3)
    app.backend.store_result(group[1].id, KeyError("second"), states.FAILURE)
    with pytest.raises(KeyError, match="second"):
        group.get(timeout=LONG)


def test_propagate_false_returns_the_exception_in_its_place(app: Celery) -> None:
    group = make_group(app, 3)
    app.backend.store_result(group[0].id, 0, states.SUCCESS)
    app.backend.store_result(group[1].id, KeyError("second"), states.FAILURE)
    app.backend.store_result(group[2].id, 2, states.SUCCESS)
    zero, error, two = group.get(timeout=LONG, propagate=False)
    assert (zero, two) == (0, 2)
    assert isinstance(error, KeyError)


def test_the_callback_gets_each_member_once(app: Celery) -> None:
    group = make_group(app, 20)
    succeed(app, group)
    calls: List[Tuple[str, Any]] = []
    group.get(timeout=LONG, callback=lambda *args: calls.append(args))
    assert sorted(calls) == sorted((node.id, n) for n, node in enumerate(group))


def test_on_message_gets_every_state_of_every_member(app: Celery, make_app: Apps) -> None:
    group, worker = make_group(app, 5), make_app()
    for node in group:
        worker.backend.store_result(node.id, None, states.STARTED)
    succeed(worker, group)
    seen: Dict[str, List[str]] = {node.id: [] for node in group}
    group.get(timeout=LONG, on_message=lambda m: seen[m["task_id"]].append(m["status"]))
    assert list(seen.values()) == [["STARTED", "SUCCESS"]] * 5


def test_on_interval_is_called_while_waiting_for_a_group(app: Celery) -> None:
    group = make_group(app, 2)
    calls: List[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) == 3:
            succeed(app, group)

    assert group.get(timeout=LONG, interval=0.05, on_interval=count) == [0, 1]
    assert len(calls) >= 3


def test_iter_native_yields_members_as_they_become_ready(app: Celery) -> None:
    group = make_group(app, 3)
    ready = group.iter_native(timeout=LONG)
    for position in (2, 0, 1):
        app.backend.store_result(group[position].id, position, states.SUCCESS)
        task_id, meta = next(ready)
        assert (task_id, meta["status"], meta["result"]) == (
            group[position].id, "SUCCESS", position
        )  # fmt: skip
    assert list(ready) == []


def test_iteration_can_stop_at_any_point(app: Celery) -> None:
    group = make_group(app, 10)
    succeed(app, group)
    ready = group.iter_native(timeout=LONG)
    next(ready)
    ready.close()
    assert not app.backend.layout.inbox.waited_for
    assert group.get(timeout=LONG) == list(range(10))


def test_a_group_within_a_group_is_joined(app: Celery) -> None:
    inner = make_group(app, 3)
    leaf = app.AsyncResult(new_id())
    innermost = make_group(app, 2)
    outer = GroupResult(new_id(), [inner, leaf, GroupResult(new_id(), [innermost], app=app)])
    waiting = Waiting(lambda: outer.get(timeout=LONG))
    app.backend.store_result(leaf.id, "leaf", states.SUCCESS)
    succeed(app, innermost)
    succeed(app, inner)
    assert waiting.result() == [[0, 1, 2], "leaf", [[0, 1]]]


def test_iter_native_yields_a_nested_group_once_it_is_complete(app: Celery) -> None:
    inner, leaf = make_group(app, 2), app.AsyncResult(new_id())
    outer = GroupResult(new_id(), [inner, leaf], app=app)
    app.backend.store_result(inner[0].id, 0, states.SUCCESS)
    app.backend.store_result(leaf.id, "leaf", states.SUCCESS)
    ready = outer.iter_native(timeout=LONG)
    task_id, meta = next(ready)
    assert (task_id, meta["result"]) == (leaf.id, "leaf")
    app.backend.store_result(inner[1].id, 1, states.SUCCESS)
    assert next(ready) == (inner.id, inner.results)
    assert list(ready) == []


def test_an_empty_group_within_a_group_is_ready(app: Celery) -> None:
    leaf = app.AsyncResult(new_id())
    app.backend.store_result(leaf.id, 1, states.SUCCESS)
    outer = GroupResult(new_id(), [leaf, GroupResult(new_id(), [], app=app)], app=app)
    assert outer.get(timeout=LONG) == [1, []]


def test_a_failure_within_a_nested_group_raises(app: Celery) -> None:
    inner = make_group(app, 2)
    outer = GroupResult(new_id(), [inner], app=app)
    app.backend.store_result(inner[0].id, 0, states.SUCCESS)
    app.backend.store_result(inner[1].id, KeyError("inner"), states.FAILURE)
    with pytest.raises(KeyError, match="inner"):
        outer.get(timeout=LONG)


def test_several_threads_can_get_the_same_group(app: Celery) -> None:
    group = make_group(app, 30)
    waits = [Waiting(lambda: group.get(timeout=LONG)) for _ in range(5)]
    succeed(app, group)
    assert [waiting.result() for waiting in waits] == [list(range(30))] * 5


def test_a_member_fetched_before_is_not_waited_for(app: Celery) -> None:
    group = make_group(app, 3)
    succeed(app, group)
    assert group[1].get(timeout=LONG) == 1
    assert group.get(timeout=LONG) == [0, 1, 2]
    assert group.get(timeout=LONG) == [0, 1, 2]


def test_a_member_that_ignores_its_result_is_not_waited_for(app: Celery) -> None:
    group = make_group(app, 2)
    group[0].ignored = True
    app.backend.store_result(group[1].id, 1, states.SUCCESS)
    assert group.get(timeout=LONG) == [None, 1]


def test_a_group_calls_its_callback_when_it_has_been_joined(app: Celery) -> None:
    group = make_group(app, 3)
    calls: List[Any] = []
    group.then(calls.append)
    succeed(app, group)
    group.get(timeout=LONG)
    assert len(calls) == 1


def test_ready_successful_failed_and_completed_count(app: Celery) -> None:
    group = make_group(app, 3)
    assert group.waiting()
    assert not group.ready()
    app.backend.store_result(group[0].id, 0, states.SUCCESS)
    assert group.completed_count() == 1
    app.backend.store_result(group[1].id, KeyError(), states.FAILURE)
    app.backend.store_result(group[2].id, 0, states.SUCCESS)
    assert group.ready()
    assert group.failed()
    assert not group.successful()
    assert group.completed_count() == 2


def test_get_many_yields_each_as_it_becomes_ready(app: Celery, make_app: Apps) -> None:
    ids = [new_id() for _ in range(3)]
    app.backend.store_result(ids[1], "b", states.SUCCESS)
    many = make_app().backend.get_many(ids, timeout=LONG)
    task_id, meta = next(many)
    assert (task_id, meta["result"]) == (ids[1], "b")
    app.backend.store_result(ids[2], "c", states.SUCCESS)
    app.backend.store_result(ids[0], "a", states.SUCCESS)
    assert {i: m["result"] for i, m in many} == {ids[0]: "a", ids[2]: "c"}


def test_get_many_with_one_iteration_yields_what_is_ready(app: Celery) -> None:
    ids = [new_id() for _ in range(5)]
    app.backend.store_result(ids[1], 1, states.SUCCESS)
    app.backend.store_result(ids[3], KeyError(), states.FAILURE)
    app.backend.store_result(ids[4], None, states.STARTED)
    found = dict(app.backend.get_many(ids, max_iterations=1))
    assert {i: meta["status"] for i, meta in found.items()} == {
        ids[1]: "SUCCESS", ids[3]: "FAILURE"
    }  # fmt: skip


def test_get_many_ends_at_its_timeout(app: Celery) -> None:
    ids = [new_id() for _ in range(3)]
    app.backend.store_result(ids[0], 1, states.SUCCESS)
    found: List[str] = []
    with pytest.raises(TimeoutError):
        found.extend(task_id for task_id, _ in app.backend.get_many(ids, timeout=0.3))
    # A busy broker may not have reported in time that one is ready.
    assert found in ([], [ids[0]])


def test_iter_meta_of_a_result_set_reads_once(app: Celery) -> None:
    group = make_group(app, 3)
    app.backend.store_result(group[0].id, 7, states.SUCCESS)
    assert [meta["result"] for meta in group._iter_meta()] == [7]


def test_a_saved_group_is_restored_and_joined_in_another_process(app: Celery) -> None:
    group = make_group(app, 5)
    group.save()
    succeed(app, group)
    ids, values = subprocesses.run(app, subprocess_jobs.restore_and_join, group_id=group.id)
    assert ids == [node.id for node in group]
    assert values == list(range(5))


def test_a_saved_nested_group_with_parents_is_restored_whole(app: Celery, make_app: Apps) -> None:
    parent = app.AsyncResult(new_id())
    inner = make_group(app, 2)
    outer = GroupResult(
        new_id(), [app.AsyncResult(new_id(), parent=parent), inner], app=app, parent=parent
    )
    outer.save()
    restored = GroupResult.restore(outer.id, app=make_app())
    assert restored.as_tuple() == outer.as_tuple()
    assert restored[0].parent.id == parent.id


def test_a_deleted_group_is_gone_for_all_processes(app: Celery, make_app: Apps) -> None:
    group, kept = make_group(app, 2), make_group(app, 2)
    for each in (group, kept):
        each.save()
    assert subprocesses.run(app, subprocess_jobs.restored, group_id=group.id) == [
        n.id for n in group
    ]
    group.delete()
    assert GroupResult.restore(group.id, app=app) is None
    assert GroupResult.restore(group.id, app=make_app()) is None
    assert subprocesses.run(app, subprocess_jobs.restored, group_id=group.id) is None
    assert GroupResult.restore(kept.id, app=app) is not None


def test_another_process_may_delete_a_group(app: Celery) -> None:
    group = make_group(app, 2)
    group.save()
    subprocesses.run(app, subprocess_jobs.delete_group, group_id=group.id)
    assert GroupResult.restore(group.id, app=app) is None


def test_a_group_saved_twice_is_restored_as_saved_last(app: Celery) -> None:
    first = make_group(app, 2)
    first.save()
    second = GroupResult(first.id, [app.AsyncResult(new_id())], app=app)
    second.save()
    restored = GroupResult.restore(first.id, app=app)
    assert [node.id for node in restored] == [second[0].id]


def test_an_unknown_group_is_none(app: Celery) -> None:
    assert GroupResult.restore(new_id(), app=app) is None
    GroupResult(new_id(), [], app=app).delete()


def test_a_group_and_a_task_may_share_an_id(app: Celery, make_app: Apps) -> None:
    group = make_group(app, 2)
    app.backend.store_result(group.id, "task", states.SUCCESS)
    group.save()
    reader = make_app()
    assert reader.AsyncResult(group.id).result == "task"
    assert GroupResult.restore(group.id, app=reader) is not None
    reader.AsyncResult(group.id).forget()
    assert GroupResult.restore(group.id, app=reader) is not None


def test_reload_group_result_bypasses_the_cache(make_app: Apps) -> None:
    app = make_app(result_cache_max=100)
    group = make_group(app, 1)
    group.save()
    assert len(GroupResult.restore(group.id, app=app)) == 1
    GroupResult(group.id, [app.AsyncResult(new_id()) for _ in range(2)], app=app).save()
    app.backend.reload_group_result(group.id)
    assert len(GroupResult.restore(group.id, app=app)) == 2


def test_forget_of_a_group_forgets_its_members(app: Celery, make_app: Apps) -> None:
    group = make_group(app, 20)
    succeed(app, group)
    group.forget()
    reader = make_app()
    assert {reader.AsyncResult(node.id).state for node in group} == {states.PENDING}
