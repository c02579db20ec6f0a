"""A registry that finds its own entries: every module of one package is imported on first use.

Registration stands beside the implementation, so adding an entry is adding a file. Names and aliases share
one namespace; a collision raises, a miss suggests the nearest names.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ropepatch.errors import RegistryError, unknown_name

T = TypeVar("T")


class Registry(Generic[T]):
    """Names to entries.

    Args:
        kind: what an entry is, for messages ("method", "task").
        package: dotted name of the package whose modules register entries when imported, or None.
    """

    def __init__(self, kind: str, package: str | None = None) -> None:
        self.kind = kind
        self._package = package
        self._loaded = package is None
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}

    def register(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """A decorator that files its argument under `name` and every alias.

        Raises:
            RegistryError: a name or alias is taken by another entry.
        """

        def file_entry(entry: T) -> T:
            for word in (name, *aliases):
                holder = self._aliases.get(word, word)
                if holder in self._entries:
                    raise RegistryError(
                        f"{self.kind} name {word!r} is claimed twice",
                        given=f"{name} ({_where(entry)})",
                        hint=f"it belongs to {holder!r} ({_where(self._entries[holder])}); rename one of the two",
                    )
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return file_entry

    def get(self, name: str) -> T:
        """The entry called `name`, by name or alias.

        Raises:
            UnknownNameError: nothing is called so; the message suggests near names.
        """
        self._load()
        key = self._aliases.get(name, name)
        if key not in self._entries:
            raise unknown_name(self.kind, name, (*self._entries, *self._aliases))
        return self._entries[key]

    def names(self) -> tuple[str, ...]:
        """The primary names, sorted."""
        self._load()
        return tuple(sorted(self._entries))

    def __iter__(self) -> Iterator[T]:
        return (self._entries[name] for name in self.names())

    def __contains__(self, name: str) -> bool:
        self._load()
        return self._aliases.get(name, name) in self._entries

    def _load(self) -> None:
        if self._loaded or self._package is None:
            return
        package = importlib.import_module(self._package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self._package}.{module.name}")
        # Only now: an import that fails must fail again at the next use, not leave half a registry behind.
        self._loaded = True


def _where(entry: object) -> str:
    return f"{getattr(entry, '__module__', type(entry).__module__)}"
