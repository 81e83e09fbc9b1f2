"""Settings: ``orchestrator_*`` in the Celery configuration, or keyword arguments of ``Orchestrator``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from orchestrator.errors import ConfigurationError
from orchestrator.runtime import django_store

PREFIX = "orchestrator_"

Seconds = Annotated[float, Field(gt=0)]


class Settings(BaseModel):
    """Durations are in seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    store: str | None = None
    migrate: bool = True
    heartbeat_limit: Seconds = 15.0
    poll_interval: Seconds = 1.0
    publish_grace: Seconds = 30.0
    store_patience: Seconds = 600.0
    max_lost: Annotated[int, Field(ge=0)] = 3
    max_publications: Annotated[int, Field(ge=1)] = 6
    max_pass_attempts: Annotated[int, Field(ge=1)] = 3
    retention: Annotated[timedelta, Field(gt=timedelta(0), le=timedelta(days=36500))] | None = None
    max_payload_bytes: Annotated[int, Field(ge=1)] = 1024 * 1024
    mask: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    signals: Literal["auto", "always"] = "auto"
    slow_replay: Seconds = 1.0
    step_results: bool = True
    live_passes: Annotated[int, Field(ge=0)] = 0
    hand_off: bool = False
    hand_off_limit: Seconds = 5.0

    @classmethod
    def read(cls, conf: Mapping[str, Any], options: Mapping[str, Any]) -> Settings:
        """Read the settings of an app; what ``Orchestrator`` was given goes before the app's configuration."""
        # not declared with app.add_defaults: those would go before what a module or Django sets
        _refuse_unknown(conf, set(cls.model_fields))
        values = {name: conf[PREFIX + name] for name in cls.model_fields if conf.get(PREFIX + name) is not None}
        values.update({name: value for name, value in options.items() if value is not None})
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = PREFIX + ".".join(str(part) for part in first["loc"])
            raise ConfigurationError(f"the setting {name} cannot be {first['input']!r}: {first['msg']}") from error

    def require_store(self) -> str:
        """Return the URL of the store; raises ``ConfigurationError`` if there is none."""
        if self.store is None:
            raise ConfigurationError(
                "no store is set; give Orchestrator(app, store=…) or set orchestrator_store, "
                "for example to sqlite:///sagas.db or postgresql+psycopg://localhost/shop"
            )
        alias = django_store.find_alias(self.store)
        return self.store if alias is None else django_store.url_of(alias)


def _refuse_unknown(conf: Mapping[str, Any], known: set[str]) -> None:
    namespace = str(getattr(conf, "prefix", None) or "").lower()
    listed = ", ".join(sorted(PREFIX + name for name in known))
    for key in conf:
        name = key.lower().removeprefix(namespace)
        if name.startswith(PREFIX) and name.removeprefix(PREFIX) not in known:
            raise ConfigurationError(f"there is no setting {key}; known are {listed}")
