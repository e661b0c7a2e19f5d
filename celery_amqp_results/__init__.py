"""Task results through RabbitMQ alone: a result backend for Celery 5.

Set ``result_backend = "amqp://"``; nothing has to be imported. See ``docs/`` for the rest.
"""

from __future__ import annotations

import sys

import celery.backends

from celery_amqp_results import backend, errors
from celery_amqp_results.backend import AMQPBackend

__all__ = ("AMQPBackend", "errors")

__version__ = "0.1.0"

# The backend's module in Celery 4: imports from there keep working.
sys.modules.setdefault("celery.backends.amqp", backend)
celery.backends.amqp = sys.modules["celery.backends.amqp"]
