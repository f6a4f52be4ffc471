"""This package's kernels inside other packages' models; each module here needs the package that it is named after."""

import importlib
from types import ModuleType

INTEGRATIONS = ("lightning", "timm")


def __getattr__(name: str) -> ModuleType:
    if name in INTEGRATIONS:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *INTEGRATIONS]
