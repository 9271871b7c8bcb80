"""Turn `CALLBACKS`, a list of names, into callbacks, or say what is wrong.

A name is `package.module:attribute`, or that of an entry point which an installed package
has in the group `atlas_receiver.callbacks`. It leads to a `Callbacks` object, or to a
function that makes one of the settings, as the built-in ones are.
"""

import importlib
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import entry_points
from inspect import isfunction
from pathlib import Path
from types import ModuleType

from app.dispatch import blame
from app.dispatch.registry import Callback, Callbacks, duplicate
from app.errors import ConfigError

GROUP = "atlas_receiver.callbacks"


def load(spec: str, settings: object = None) -> tuple[Callback, ...]:
    """Import what `spec` names; raises `ConfigError` with the remedy. Empty means none.

    `settings` is what functions that make callbacks are called with.
    """
    found: dict[str, Callback] = {}
    # One name twice is one set of callbacks, also where a function makes it.
    names = dict.fromkeys(filter(None, (part.strip() for part in spec.split(","))))
    for name in names:
        for callback in _callbacks(name, settings):
            known = found.setdefault(callback.name, callback)
            # One object named twice, or re-exported by another module, is one object.
            if known is not callback:
                raise duplicate(known, callback)
    return tuple(found.values())


def _callbacks(name: str, settings: object) -> Callbacks:
    module_name, colon, attribute = (_installed(name) or name).partition(":")
    if not (module_name.strip() and colon and attribute.strip()):
        raise ConfigError(
            f"CALLBACKS names {name!r}: write package.module:attribute, "
            f"for example my_package.onboarding:callbacks{_offer()}"
        )
    module = _module(module_name.strip())
    return _attribute(module, attribute.strip(), settings)


def _installed(name: str) -> str | None:
    """Give what an entry point of this name leads to."""
    return next((entry.value for entry in entry_points(group=GROUP, name=name)), None)


def _offer() -> str:
    names = sorted({entry.name for entry in entry_points(group=GROUP)})
    return f"; installed packages offer {', '.join(names)}" if names else ""


def _module(name: str) -> ModuleType:
    # As `python -m` does: what lies in the working directory can be imported.
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(_not_found(name, error.name)) from error
        raise ConfigError(_broken(name, error)) from error
    except ConfigError as error:
        raise ConfigError(f"CALLBACKS names {name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        raise ConfigError(_broken(name, error)) from error


def _not_found(name: str, missing: str) -> str:
    looked = "\n  ".join(path or "." for path in sys.path)
    return (
        f"CALLBACKS names the module {name!r}, but there is no {missing!r}. The working directory "
        f"is {Path.cwd()}; modules in it can be imported. Looked in:\n  {looked}"
    )


def _broken(name: str, error: BaseException) -> str:
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename
    ]
    place = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames[1:] else ""
    if isinstance(error, SyntaxError):
        place = f" at {error.filename}:{error.lineno}"
    reason = blame.describe(error)
    return f"CALLBACKS names the module {name!r}, which fails on import{place}: {reason}"


def _attribute(module: ModuleType, attribute: str, settings: object) -> Callbacks:
    found = getattr(module, attribute, None)
    if isfunction(found):
        found = _made(f"{module.__name__}:{attribute}", found, settings)
    if isinstance(found, Callbacks):
        return _filled(module, attribute, found)
    name = f"{module.__name__}:{attribute}"
    problem = (
        f"has no {attribute!r}"
        if not hasattr(module, attribute)
        else f"has {attribute!r}, which is a {type(found).__name__} and no Callbacks object"
    )
    others = sorted(key for key, value in vars(module).items() if isinstance(value, Callbacks))
    hint = (
        f"it has {', '.join(others)}"
        if others
        else "it has none: write `callbacks = Callbacks()`, and @callbacks.on(…) above a function"
    )
    raise ConfigError(f"CALLBACKS names {name!r}, but {module.__name__} {problem}; {hint}")


def _made(name: str, make: Callable[[object], object], settings: object) -> object:
    try:
        return make(settings)
    except ConfigError as error:
        raise ConfigError(f"CALLBACKS names {name!r}: {error}") from error
    except Exception as error:
        reason = blame.describe(error)
        raise ConfigError(
            f"CALLBACKS names the function {name!r}, which is called with the settings "
            f"and fails: {reason}"
        ) from error


def _filled(module: ModuleType, attribute: str, found: Callbacks) -> Callbacks:
    if not len(found):
        raise ConfigError(
            f"CALLBACKS names {module.__name__}:{attribute}, but nothing is registered there: "
            f'put @{attribute}.on("envelope.signed") above a function, '
            "in a module that is imported by this one"
        )
    return found
