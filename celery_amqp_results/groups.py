"""Groups that ``GroupResult.save`` keeps: how they are stored, read and removed.

It may import ``recording``, ``reading`` and what is below them.
"""

from __future__ import annotations

from typing import Callable, Optional

from celery.result import GroupResult, result_from_tuple

from celery_amqp_results import errors
from celery_amqp_results.layouts import Layout
from celery_amqp_results.library_types import App, Meta
from celery_amqp_results.protocol.ids import plain_ids
from celery_amqp_results.reading import Reader
from celery_amqp_results.recording import Recorder
from celery_amqp_results.waiting.groups import ask_in_one_pass

__all__ = ("SavedGroups",)

#: The state of a saved group, in header and body.
GROUP_STATE = "GROUP"


class SavedGroups:
    """Saves groups and restores them; makes the groups of an app read in one pass.

    Thread-safe.

    Parameters:
        app: the app of the restored results.
        layout: returns the layout of this process.
        recorder: stores them.
        reader: reads them.
    """

    def __init__(
        self, app: App, layout: Callable[[], Layout], recorder: Recorder, reader: Reader
    ) -> None:
        self._app = app
        self._layout = layout
        self._recorder = recorder
        self._reader = reader
        ask_in_one_pass(app)

    def save(self, group_id: str, result: GroupResult) -> None:
        """Keep a group: its id and those of its members.

        Raises:
            kombu.exceptions.EncodeError: when the serializer cannot encode it.
            ResultTooLarge, BackendUnavailable: when the broker did not take it.
        """
        members = plain_ids(result.as_tuple())
        meta = {"status": GROUP_STATE, "group_id": group_id, "result": members}
        self._recorder.save_group(group_id, GROUP_STATE, meta)

    def restore(self, group_id: str) -> Optional[Meta]:
        """Return the meta of a saved group with its result object, or ``None``.

        Raises:
            ForeignMessage: when the message holds no group.
            LookupTimeout, BackendUnavailable: as every look-up.
        """
        meta = self._reader.read_group(group_id)
        if meta is None:
            return None
        try:
            meta["result"] = result_from_tuple(plain_ids(meta["result"]), self._app)
        except Exception as exc:
            raise errors.ForeignMessage(
                f"the group {group_id!r} has no members as its result: {exc!r:.300}"
            ) from exc
        return meta

    def delete(self, group_id: str) -> None:
        """Delete a saved group; its members are kept."""
        self._layout().forget_group(group_id)
