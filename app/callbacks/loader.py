"""Turn `CALLBACKS`, a list of `package.module:attribute`, into callbacks, or say what is wrong."""

import importlib
import sys
import traceback
from pathlib import Path
from types import ModuleType

from app.dispatch import blame
from app.dispatch.registry import Callback, Callbacks, duplicate
from app.errors import ConfigError


def load(spec: str) -> tuple[Callback, ...]:
    """Import what `spec` names; raises `ConfigError` with the remedy. Empty means none."""
    found: dict[str, Callback] = {}
    for name in filter(None, (part.strip() for part in spec.split(","))):
        for callback in _callbacks(name):
            known = found.setdefault(callback.name, callback)
            # One object named twice, or re-exported by another module, is one object.
            if known is not callback:
                raise duplicate(known, callback)
    return tuple(found.values())


def _callbacks(name: str) -> Callbacks:
    module_name, colon, attribute = name.partition(":")
    if not (module_name.strip() and colon and attribute.strip()):
        raise ConfigError(
            f"CALLBACKS names {name!r}: write package.module:attribute, "
            "for example my_package.onboarding:callbacks"
        )
    module = _module(module_name.strip())
    return _attribute(module, attribute.strip())


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


def _attribute(module: ModuleType, attribute: str) -> Callbacks:
    found = getattr(module, attribute, None)
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


def _filled(module: ModuleType, attribute: str, found: Callbacks) -> Callbacks:
    if not len(found):
        raise ConfigError(
            f"CALLBACKS names {module.__name__}:{attribute}, but nothing is registered there: "
            f'put @{attribute}.on("envelope.signed") above a function, '
            "in a module that is imported by this one"
        )
    return found
