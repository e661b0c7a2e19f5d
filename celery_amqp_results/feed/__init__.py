"""The live half: the inbox, to which the broker pushes states as workers publish them.

It may import :mod:`celery_amqp_results.store` and what is below it.
"""
