"""Mechanisms that every room uses, one of each, without knowledge of results or of AMQP.

Retries and deadlines, waking a thread that waits for a socket, bounded memory, logging once,
starting threads. It may import the options and errors.
"""
