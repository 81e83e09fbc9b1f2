"""Pages about workflows inside Flower; ``celery -A app orchestrator flower`` runs Flower with them.

Nothing here changes a Flower that is started in another way.  Flower itself is imported when the command runs.
"""
