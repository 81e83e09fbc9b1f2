import os
from pathlib import Path

BASE_DIR = Path(__file__).resolve().parent.parent

SECRET_KEY = "an example's"  # noqa: S105
DEBUG = True
ALLOWED_HOSTS = ["localhost", "127.0.0.1", "testserver"]
ROOT_URLCONF = "proj.urls"
INSTALLED_APPS = ["orders"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True

DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": BASE_DIR / "db.sqlite3",
        # SQLite has one writer at a time: Django is to wait for its turn as the workers do
        "OPTIONS": {"timeout": 30, "transaction_mode": "IMMEDIATE"},
        # in a file: tests and the store have a connection each
        "TEST": {"NAME": BASE_DIR / "test.sqlite3"},
    }
}

CELERY_BROKER_URL = os.environ.get("BROKER_URL", "redis://localhost:6379/0")
CELERY_ORCHESTRATOR_STORE = "django"  # the store is in the default database
