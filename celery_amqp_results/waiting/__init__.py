"""Waiting for tasks: followers, callbacks and watches.

A follower combines what the inbox is pushed with what the store keeps. It may import
:mod:`celery_amqp_results.feed` and what is below it.
"""
