"""Signals: what happens to instances and their steps, for observers; Celery's own kind of signal.

::

    from orchestrator import signals

    @signals.instance_ended.connect
    def count(sender, instance_id, status, **_):
        ...

A receiver is called in the process that brought it about, after the commit; if that process dies before, by a thread
of some worker, so **at least once** (``notice_id`` is the same each time).  Nothing that a receiver raises has any
effect, but it is logged.  Signals of one instance may be seen out of their order, for they come from many processes.
What nobody takes is kept for a day.  Connect receivers where your tasks are defined, so that every process has them;
with the setting ``orchestrator_signals="always"`` they are also told of what was done by processes that have none.

All are given ``sender``, ``app``, ``instance_id``, ``workflow``, ``run``, ``at`` (an aware datetime), ``notice_id``
and ``generation``, which tells the lives of an id apart that was purged and used again; accept ``**kwargs``, for more
may be added.  ``sender`` is the name of the workflow, for those of steps the name of their task.
"""

from __future__ import annotations

from celery.utils.dispatch import Signal

__all__ = [
    "compensation_failed",
    "compensation_settled",
    "instance_blocked",
    "instance_compensating",
    "instance_ended",
    "instance_resumed",
    "instance_started",
    "replay_slow",
    "step_lost",
    "step_retried",
    "step_scheduled",
    "step_settled",
    "step_started",
]

#: The first pass of an instance was made.  ``parent_id``: the instance that started it as a child, or ``None``.
instance_started = Signal(name="instance_started", providing_args={"parent_id"})

#: An instance has ended.  ``again``: it had ended before, and was undone by ``undo()``, or its compensations repaired.
#: ``status``; ``seconds`` since it was recorded; ``error_type`` and ``message`` of what it raised, or ``None``.
instance_ended = Signal(name="instance_ended", providing_args={"status", "seconds", "again", "error_type", "message"})

#: An instance is ``BLOCKED``: it waits for an operator or a deploy.  ``reason``, in words.
instance_blocked = Signal(name="instance_blocked", providing_args={"reason"})

#: An instance begins to undo what it did: a failure or a cancellation left its root scope, or ``undo()`` was called.
instance_compensating = Signal(name="instance_compensating", providing_args=set())

#: What was ``BLOCKED`` goes on.
instance_resumed = Signal(name="instance_resumed", providing_args=set())

_STEP = {"seq", "kind", "task_id", "attempt", "undoes"}

#: A step, a compensation or a child (``kind``) is to be run: the first time, and for each further attempt.
#: ``task_id`` is that of its Celery message, or of the child; ``undoes`` the ``seq`` that a compensation undoes.
step_scheduled = Signal(name="step_scheduled", providing_args=_STEP)

#: An attempt of a step has begun.  ``waited_seconds``: since its message was first sent.
step_started = Signal(name="step_started", providing_args={*_STEP, "waited_seconds"})

#: A step or child has its outcome.  ``outcome``; ``seconds`` since its last attempt began (``None``: none began), of a
#: foreign step since it was sent; ``error_type`` and ``message``, or ``None``; ``lost``: how many attempts were lost.
step_settled = Signal(
    name="step_settled", providing_args={*_STEP, "outcome", "seconds", "error_type", "message", "lost"}
)

#: An attempt of a step has failed, and another follows.  ``seconds`` since it began; ``error_type`` and ``message``.
step_retried = Signal(name="step_retried", providing_args={*_STEP, "seconds", "error_type", "message"})

#: An attempt of a step was lost with its worker; another follows, unless ``step_settled`` says otherwise.  Arguments
#: are those of ``step_retried``; ``message`` says how it was lost.
step_lost = Signal(name="step_lost", providing_args=step_retried.providing_args)

#: A compensation has its outcome, whatever it is; arguments are those of ``step_settled``.
compensation_settled = Signal(name="compensation_settled", providing_args=step_settled.providing_args)

#: A compensation did not succeed, and no operator has skipped it: what it was to undo stands.  Arguments are those of
#: ``step_settled``.
compensation_failed = Signal(name="compensation_failed", providing_args=step_settled.providing_args)

#: A pass over the history took longer than the setting ``orchestrator_slow_replay``.  ``seconds``; ``records`` that it
#: went over.  Sent once, by the process that made the pass.
replay_slow = Signal(name="replay_slow", providing_args={"seconds", "records"})
