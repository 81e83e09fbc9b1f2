"""The example: a small shop on Celery, and one workflow that makes its checkout durable."""
