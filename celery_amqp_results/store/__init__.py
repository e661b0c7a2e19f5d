"""The durable half: publishing states, and reading, packing and removing what shards keep.

It may import :mod:`celery_amqp_results.amqp` and :mod:`celery_amqp_results.protocol`.
"""
