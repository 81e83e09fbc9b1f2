"""``celery -A benchmarks.worker_app worker``: what a worker of a contender loads."""

from benchmarks.app import make_worker_app

app = make_worker_app()
