"""Chords: how the results of a header are collected and how the body is fired.

It may import :mod:`celery_amqp_results.waiting` and what is below it.
"""
