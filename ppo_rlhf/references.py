"""Python objects named in a configuration: `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ppo_rlhf.errors import UserError, did_you_mean


def is_reference(value: str) -> bool:
    """Whether the value names a Python object, not a file or a model: `something:name` with a valid name."""
    module, colon, name = value.rpartition(":")
    return bool(colon) and bool(module) and name.isidentifier() and not os.path.exists(value)


def load_object(reference: str) -> Any:
    """The object that `module:name` or `file.py:name` names; the present folder counts as importable.

    Raises UserError when the module or the name cannot be found, or the module raises on import.
    """
    location, _, name = reference.rpartition(":")
    module = _from_file(Path(location), reference) if location.endswith(".py") else _from_name(location, reference)
    if not hasattr(module, name):
        raise UserError(f"{reference}: {location} has no {name}.{did_you_mean(name, vars(module))}")
    return getattr(module, name)


def load_callable(reference: str, arguments: Mapping[str, Any], *, setting: str) -> Any:
    """The function that `reference` names, with these keyword arguments bound to it; a class is made with them.

    Raises UserError for what cannot be called, and for an argument that it does not name.
    """
    function = load_object(reference)
    if not callable(function):
        raise UserError(f"{setting}: {reference} is not a function, but {type(function).__name__}.")
    check_arguments(function, arguments, reference, setting=setting)
    if isinstance(function, type):
        return function(**arguments)
    if not arguments:
        return function
    return functools.wraps(function)(functools.partial(function, **arguments))


def check_arguments(function: Any, arguments: Mapping[str, Any], reference: str, *, setting: str) -> None:
    """Raises UserError for an argument that the function does not name: among **columns it would go unseen."""
    if not arguments:
        return
    parameters = inspect.signature(function).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind != parameter.VAR_KEYWORD]
    for name in arguments:
        if name not in known:
            raise UserError(f"{setting}: {reference} names no argument {name!r}.{did_you_mean(name, known)}")


def call(reference: str, *arguments: Any, **named: Any) -> Any:
    """What the function that `reference` names returns; an iterator's items as a list.

    Raises UserError, which names the function, when it raises.
    """
    function = load_object(reference)
    try:
        result = function(*arguments, **named)
        return list(result) if isinstance(result, Iterator) else result
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{reference} raised {type(error).__name__}: {error}") from error


def _from_file(path: Path, reference: str) -> Any:
    if not path.is_file():
        raise UserError(f"{reference}: there is no file {path}.")
    name = f"ppo_rlhf_user_{path.resolve().stem}_{abs(hash(path.resolve()))}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise UserError(f"{reference}: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _from_name(name: str, reference: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        raise UserError(f"{reference}: importing {name} raised {type(error).__name__}: {error}") from error
