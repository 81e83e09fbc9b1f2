# loaded whenever Django starts, so that shared_task and shared_workflow find this app
from .celery import app as celery_app
from .celery import orchestrator

__all__ = ("celery_app", "orchestrator")
