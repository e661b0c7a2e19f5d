"""Waiting for tasks: followers, callbacks and watches.

A follower combines pushed states with those in the store. It may import
:mod:`celery_amqp_results.feed` and what is below it.
"""
