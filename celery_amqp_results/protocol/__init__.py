"""The objects on the broker: names, messages, pages, and the rules that rank states.

Everything here is pure: no I/O, no threads, and no clock except :mod:`.clock`, which stamps
states. It may import only :mod:`celery_amqp_results.errors`. ``docs/wire.md`` describes what these
modules write; change them together.
"""
