"""Engines that do not run on Celery, each in a process of its own that is told what to run."""
