"""Plug-ins by name: built-in ones from a table, a user's own as package.module:Class or as an object.

A plug-in is a frozen dataclass. Its fields, each with a default, are its options. It is imported only when it is asked
for, and a wrong name or option is reported before anything is loaded.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from importlib import import_module
from inspect import isabstract
from typing import Any, Literal, get_args, get_origin, get_type_hints

from . import given
from .errors import ConfigError, FedLoraError, suggest

Option = bool | int | float | str


@dataclass(frozen=True)
class Registry:
    """All plug-ins of one kind.

    Args:
        noun: the word for this kind of plug-in, for messages.
        key: the configuration key that names a plug-in.
        options_key: the configuration key with its options, such as "similarity=cosine, lam=0.01".
        base: the class that each plug-in extends, as "module:Class".
        method: the method that a user's own plug-in must have, for messages.
        names: the built-in plug-ins, name -> "module:Class".
        error: class of the errors that are raised.
    """

    noun: str
    key: str
    options_key: str
    base: str
    method: str
    names: Mapping[str, str]
    error: type[FedLoraError] = ConfigError

    def make(self, name: str, options: str = "") -> Any:
        """The plug-in of this name, with options given as text."""
        return self.load(name, **self.parse(options))

    def load(self, name: str, **options: Option) -> Any:
        """The plug-in of this name with these options. Others keep their defaults, or the values of a given object.

        Raises:
            FedLoraError: there is no such plug-in, it cannot be imported, or an option has a wrong name, type or value;
                the error's class is `error`.
        """
        cls = self.resolve(name)
        known = {f.name: f for f in fields(cls) if f.init}
        hints = get_type_hints(cls)
        for option in options:
            if option not in known:
                hint = suggest(option, known) if known else "; it has no options"
                raise self.error(f"{self.options_key}: {name} has no option {option!r}{hint}")
        checked = {option: self._check(name, option, value, hints[option]) for option, value in options.items()}
        try:
            return replace(self._given(name), **checked) if given.is_given(name) else cls(**checked)
        except (TypeError, ValueError) as error:
            raise self.error(f"{self.options_key}: {name} refuses {checked}: {error}") from error

    def resolve(self, name: str) -> type[Any]:
        """The class that a name stands for; raises the same errors as `load`."""
        if given.is_given(name):
            return self._fitting(name, type(self._given(name)))
        target = self.names.get(name, name)
        module_name, colon, class_name = target.partition(":")
        if not colon:
            raise self.error(
                f"{self.key}: unknown {self.noun} {name!r} (your own is named package.module:Class)"
                f"{suggest(name, self.names)}"
            )
        try:
            module = import_module(module_name)
        except Exception as error:  # a user's module may fail in any way while it is imported
            raise self.error(
                f"{self.key} = {name!r}: cannot import {module_name!r} ({type(error).__name__}: {error}); "
                "install it, or start in the folder that contains it"
            ) from error
        cls = getattr(module, class_name, None)
        if cls is None:
            raise self.error(f"{self.key} = {name!r}: module {module_name!r} has no class {class_name!r}")
        return self._fitting(name, cls)

    def _given(self, name: str) -> Any:
        return given.find(name, self.key, self.error)

    def _fitting(self, name: str, cls: Any) -> type[Any]:
        """The class, after a check that it is a plug-in of this kind."""
        base_module, _, base_name = self.base.partition(":")
        base = getattr(import_module(base_module), base_name)
        if not (isinstance(cls, type) and issubclass(cls, base) and is_dataclass(cls)) or isabstract(cls):
            raise self.error(
                f"{self.key} = {name!r}: {getattr(cls, '__name__', cls)} is no {self.noun}; write a frozen dataclass "
                f"that extends {base_module}.{base_name} and has a method {self.method}"
            )
        return cls

    def parse(self, text: str) -> dict[str, Option]:
        """Options from text: "similarity=cosine, lam=0.01" gives {"similarity": "cosine", "lam": 0.01}.

        A value is read as a TOML bool, number or string, or else as plain text; it cannot contain a comma.

        Raises:
            FedLoraError: a part is not name=value, or a name occurs twice.
        """
        options: dict[str, Option] = {}
        for item in filter(None, (part.strip() for part in text.split(","))):
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or not name or not value:
                raise self.error(f"{self.options_key}: got {item!r}, expected name=value, such as lam=0.01")
            name = name.replace("-", "_")
            if name in options:
                raise self.error(f"{self.options_key}: {name} is given twice in {text!r}; leave out one")
            options[name] = _scalar(value)
        return options

    def _check(self, name: str, option: str, value: Option, expected: Any) -> Option:
        """The value, converted to its field's type; the class must itself check types other than scalar and Literal."""
        where = f"{self.options_key}: {name}'s {option} = {value!r}"
        if get_origin(expected) is Literal:
            choices = [str(choice) for choice in get_args(expected)]
            if value not in get_args(expected):
                raise self.error(f"{where}{suggest(str(value), choices)}")
            return value
        if expected is float and type(value) is int:
            return float(value)
        if expected is str and type(value) in (int, float):
            return str(value)
        if expected in (bool, int, float, str) and type(value) is not expected:
            raise self.error(f"{where} is {type(value).__name__}, expected {expected.__name__}")
        return value


def _scalar(text: str) -> Option:
    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, Option) else text
