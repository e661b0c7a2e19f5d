"""The only door to py-amqp: connections, pools, frames, confirms and declarations.

No other room touches a private name of py-amqp. It may import :mod:`celery_amqp_results.toolkit`
and what is below it.
"""
