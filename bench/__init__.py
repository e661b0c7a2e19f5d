"""Measures the backend beside others on one machine: ``python -m bench --help``.

- ``figures`` what is measured, and its statistics; ``compare`` the regression check; ``report``
  the table; ``plots`` the SVG files. None of them does more I/O than to write its file.
- ``services`` starts RabbitMQ and Redis; ``peers`` lists the backends; ``programs`` starts workers
  and assistants, which are processes that store, wait or poll on command.
- ``measures`` has a module for each measure; ``place`` gives it servers, workers and rounds.
- ``internals`` holds everything that the benchmarks know of this backend's inside.
"""
