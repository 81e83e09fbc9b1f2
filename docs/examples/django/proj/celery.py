import os

from celery import Celery

from orchestrator import Orchestrator

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "proj.settings")

app = Celery("proj")
app.config_from_object("django.conf:settings", namespace="CELERY")
orchestrator = Orchestrator(app)

app.autodiscover_tasks()  # the tasks.py of each app
app.autodiscover_tasks(related_name="workflows")  # and its workflows.py
