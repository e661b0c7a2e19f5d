"""The layout of Celery 4: one queue for each task.

It may import :mod:`celery_amqp_results.waiting` and what is below it.
"""
