"""Secrets among arguments and results: what is shown of a call to people, monitors and logs.

The store keeps the real values, which the tasks need; the setting ``orchestrator_mask`` says what nobody is shown::

    orchestrator_mask = {"shop.charge": ["card"], "shop.checkout": ["order.card.number"], "*": ["password"]}

Each entry names a parameter, a value inside one by a path of keys, or as ``return`` what the task returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from celery.utils.saferepr import saferepr

from orchestrator import codec

MASKED = "***"
EVERY_TASK = "*"
RETURNED = "return"

#: How the recorded form of an ``UndoneStep`` is told from other mappings: it has all of these.
_UNDONE = frozenset({"name", "call", "result", "outcome", "late_outcome", "idempotency_key"})


class Masks:
    """Hides what a setting names, by task; ``find_task`` returns a registered task, or ``None``."""

    def __init__(self, mask: Mapping[str, Sequence[str]], find_task: Callable[[str], Any]) -> None:
        self._mask = mask
        self._find_task = find_task

    def arguments(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return plain arguments of a task as they may be shown."""
        if not self._mask:
            return list(args), dict(kwargs)
        paths = [path.split(".") for path in self._paths(name) if path != RETURNED]
        shown_args = [self._undone(value) for value in args]
        shown = {key: self._undone(value) for key, value in kwargs.items()}
        positional = self._positional(name)
        for path in paths:
            if path[0] in shown:
                shown[path[0]] = _hide(shown[path[0]], path[1:])
            for index, value in enumerate(shown_args):
                # of a task that is not registered here nobody can say which argument is meant
                if positional is None or (index < len(positional) and positional[index] == path[0]):
                    shown_args[index] = _hide(value, path[1:] if positional is not None else [])
        return shown_args, shown

    def representations(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
        """Return the options by which a message tells monitors of its arguments; none where nothing is hidden."""
        if not self._mask:
            return {}
        shown_args, shown_kwargs = self.arguments(name, args, kwargs)
        if (shown_args, shown_kwargs) == (list(args), dict(kwargs)):
            return {}
        return {"argsrepr": saferepr(tuple(shown_args)), "kwargsrepr": saferepr(shown_kwargs)}

    def result(self, name: str, value: Any) -> Any:
        """Return a plain result of a task as it may be shown."""
        return MASKED if value is not None and self.hides_result(name) else value

    def hides_result(self, name: str) -> bool:
        """Tell whether what a task returns is hidden."""
        return RETURNED in self._paths(name)

    def list_slips(self) -> list[str]:
        """Return what is named, and is not there: a mask with a slip in it hides nothing, and nobody notices."""
        slips = []
        for name, paths in sorted(self._mask.items()):
            task = None if name == EVERY_TASK else self._find_task(name)
            if task is None and name != EVERY_TASK:
                slips.append(f"orchestrator_mask names {name}, which is no task of this app")
            if task is None:
                continue
            known = _annotations_of(task)
            if known.var_keyword is None:
                unknown = {path.split(".")[0] for path in paths} - {*known.parameters, RETURNED}
                slips += [f"orchestrator_mask names {each} of {name}, which has no such parameter" for each in unknown]
        return slips

    def _paths(self, name: str) -> list[str]:
        return [*self._mask.get(name, ()), *self._mask.get(EVERY_TASK, ())] if self._mask else []

    def _positional(self, name: str) -> tuple[str, ...] | None:
        task = self._find_task(name)
        if task is None:
            # masks of every task name what few of them have: only a mask of its own hides an unknown task's all
            return None if name in self._mask else ()
        return _annotations_of(task).positional[1 if getattr(task, "is_workflow", False) else 0 :]

    def _undone(self, value: Any) -> Any:
        """Hide inside of what a compensation is told of the step that it undoes what is hidden of that step."""
        if not isinstance(value, dict) or not value.keys() >= _UNDONE:
            return value
        args, kwargs = self.arguments(value["name"], value["call"]["args"], value["call"]["kwargs"])
        call = {"args": args, "kwargs": kwargs}
        return {**value, "call": call, "result": self.result(value["name"], value["result"])}


def _annotations_of(task: Any) -> codec.Annotations:
    return codec.annotations_of(task.function if getattr(task, "is_workflow", False) else task.run)


def _hide(value: Any, path: Sequence[str]) -> Any:
    """Return a copy of ``value`` without what stands at ``path``; a path goes into each item of a list."""
    if not path:
        return MASKED
    if isinstance(value, list | tuple):
        return [_hide(item, path) for item in value]
    if isinstance(value, dict) and path[0] in value:
        return {**value, path[0]: _hide(value[path[0]], path[1:])}
    return value
