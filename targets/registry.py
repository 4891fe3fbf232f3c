"""The backends, by the word before the colon. A new target is one line here."""

from __future__ import annotations

from typing import Protocol

from .base import Target
from .cpu import backend as cpu


class Backend(Protocol):
    """What a backend module offers."""

    def resolve(self, name: str) -> Target: ...

    def names(self) -> list[str]: ...


BACKENDS: dict[str, Backend] = {"cpu": cpu}
