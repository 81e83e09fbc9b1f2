"""The pure core: what a workflow asks for, given what has happened.

Nothing in here reads a clock, draws a random number, or knows of a database, a broker or Celery.  ``decide()`` in
``replay.py`` is a function of its arguments: the workflow function, its history, and a ``Host`` that reads signatures
and encodes values.  Read ``records.py`` first (what history is), then ``passes.py`` (how a pass goes through it), then
``saga.py`` (what is undone, in which order), and ``live.py`` (a pass that goes on where it waits, not from the top).
"""
