"""Measures the backend beside others on one machine: ``python -m bench --help``.

- ``figures`` what is measured, and its statistics; ``compare`` the regression check; ``report``
  the table; ``plots`` the SVG files. None of them does more I/O than to write its file.
- ``services`` starts RabbitMQ and Redis; ``peers`` knows the backends, and runs workers for them;
  ``assistant`` is a process that stores or waits for results as it is told.
- ``measures`` one module for each thing that is measured.
"""
