"""The shell: Celery, kombu and clocks around the core and the store.

Where a step's result goes: ``activity.py`` (claim, body) -> ``coordinator.py`` (settle) -> ``passes.py`` (the pass that
follows) -> ``decisions.py`` (what it writes) -> ``dispatch.py`` (what is published), all of it in one transaction of
``transactions.py`` but the last.  ``poller.py`` does what the clock drives, ``worker.py`` starts it.
"""
