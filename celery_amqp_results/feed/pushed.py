"""Reading pushed messages: whatever is no state of a task is counted, logged once, and left out."""

from __future__ import annotations

import logging
from typing import Optional

import amqp

from celery_amqp_results import errors
from celery_amqp_results.protocol.clock import wall
from celery_amqp_results.protocol.message import StateMessage, dated
from celery_amqp_results.protocol.names import Topology
from celery_amqp_results.toolkit.bounded import OnceLogger

__all__ = ("PushedStates",)


class PushedStates:
    """Reads the messages that one consumer receives."""

    def __init__(self, topology: Topology, logger: logging.Logger) -> None:
        self._topology = topology
        self._once = OnceLogger(logger)
        #: How many messages were not states.
        self.rejected = 0

    def read(self, message: amqp.Message) -> Optional[StateMessage]:
        """Return the state in a py-amqp message, or ``None`` if it is foreign or damaged."""
        try:
            state = StateMessage.from_properties(message.properties, message.body)
            self._topology.check_body_queue(state)
        except errors.ForeignMessage as exc:
            self.rejected += 1
            self._once.log(
                logging.WARNING, "foreign", "ignored a foreign or damaged message: %s", exc
            )
            return None
        return dated(state, wall())
