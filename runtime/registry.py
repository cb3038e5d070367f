"""Things that can be added from outside the package, by name: backends, precisions, families, targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol, TypeVar


class Named(Protocol):
    """Whatever has a name."""

    @property
    def name(self) -> str:
        """By which it is asked for."""


T = TypeVar("T", bound=Named)


class Registry(Mapping[str, T]):
    """Things by their names, in the order in which they were registered."""

    def __init__(self, *items: T) -> None:
        self._items: dict[str, T] = {}
        for item in items:
            self.register(item)

    def register(self, item: T) -> T:
        """Add one, and return it.

        Raises:
            ValueError: the name is taken.
        """
        if item.name in self._items:
            raise ValueError(f"{item.name}: is registered already")
        self._items[item.name] = item
        return item

    @contextmanager
    def registered(self, *items: T) -> Iterator[None]:
        """Add some for as long as the block takes.

        Raises:
            ValueError: a name is taken.
        """
        before = dict(self._items)
        try:
            for item in items:
                self.register(item)
            yield
        finally:
            self._items = before

    def __getitem__(self, name: str) -> T:
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)
