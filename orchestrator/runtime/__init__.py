"""The shell: Celery, kombu and clocks around the core and the store.

Where a step's result goes: ``activity.py`` (claim, body) -> ``coordinator.py`` (settle, pass) -> ``decisions.py`` (what
is written) -> ``dispatch.py`` (what is published).  ``poller.py`` does what the clock drives, ``worker.py`` starts it.
"""
