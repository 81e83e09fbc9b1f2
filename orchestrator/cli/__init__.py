"""``celery -A app orchestrator …``: the command line for operators."""

from orchestrator.cli import bulk, changing, checking, keeping, looking
from orchestrator.cli.group import orchestrator

__all__ = ["bulk", "changing", "checking", "keeping", "looking", "orchestrator"]
