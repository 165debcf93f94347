"""Registries of exchangeable parts: exact names, their classes, and the options of each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from .errors import nearest

T = TypeVar("T")


class Registry(dict[str, type[T]], Generic[T]):
    """Classes of one kind by name.

    kind: the configuration group, such as ``connector``. base: the class of which all are subclasses. builder: name of
    the method whose parameters are the options. fixed: its parameters that are not options.
    """

    def __init__(
        self, kind: str, base: type[T], classes: Mapping[str, type[T]], builder: str, fixed: Iterable[str] = ()
    ):
        super().__init__(classes)
        self.kind, self.base, self.builder, self.fixed = kind, base, builder, {"self", *fixed}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Register a custom class under `name`; used as a decorator, ``@register("mine")``.

        Raises ValueError if it is not a subclass of the base class, or if another class has that name.
        """

        def add(added: type[T]) -> type[T]:
            if not (isinstance(added, type) and issubclass(added, self.base)):
                base = f"{self.base.__module__.removesuffix('.base')}.{self.base.__name__}"
                raise ValueError(f"{self.kind} '{name}': expected a subclass of {base}")
            known = self.setdefault(name, added)
            if (known.__module__, known.__qualname__) != (added.__module__, added.__qualname__):
                raise ValueError(
                    f"{self.kind} '{name}' is already {known.__module__}.{known.__qualname__}: choose another name"
                )
            self[name] = added  # the module was reloaded
            return added

        return add

    def find(self, name: str) -> type[T]:
        """The class of this name. Raises ValueError for an unknown name."""
        if not isinstance(name, str) or name not in self:
            raise ValueError(
                f"Unknown {self.kind} '{name}'.{nearest(str(name), self)} Available: {', '.join(self)} (for a custom "
                f"{self.kind}, pass the module that registers it: modules=[...], or --module)"
            )
        return self[name]

    def options(self, name: str) -> dict[str, Any]:
        """The options of a class with their defaults; `inspect.Parameter.empty` for those without one."""
        found = self.find(name)
        parameters = inspect.signature(found if self.builder == "__init__" else getattr(found, self.builder)).parameters
        return {
            key: parameter.default
            for key, parameter in parameters.items()
            if key not in self.fixed and parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }

    def check_options(self, name: str, options: Iterable[str], key: str | None = None) -> None:
        """Raise ValueError for an unknown name or an unknown option; `key` is the prefix of the options in messages."""
        known = self.options(name)
        for option in options:
            if option not in known:
                raise ValueError(
                    f"Unknown option {key or self.kind}.{option} of '{name}'.{nearest(option, known)} "
                    f"Available options: {', '.join(known) or 'none'}"
                )
