"""The names that the documentation of Celery 4.3's ``celery.backends.amqp`` describes."""
