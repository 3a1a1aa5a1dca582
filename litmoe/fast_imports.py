"""Makes ``import litgpt`` take less than half of the time, by two measures, and ``import torchao`` quiet.

1. torchmetrics does not import torchvision, transformers, scipy and their kind. ``import litgpt`` imports lightning,
   which imports torchmetrics only to compare its version. Torchmetrics then imports every package that one of its
   metrics could use: 4.5 of 9.4 s of CPU on two cores of a Xeon server, torch included. LitGPT uses a running mean,
   none of those metrics.
2. The garbage collector pauses. It would search for cycles again and again while modules create millions of objects
   that stay: 0.7 of 5.6 s of CPU on two cores of an AMD EPYC.

transformers imports torchao when it loads a model, and so does a run with one of its optimizers. torch then logs
messages for the developers of torchao (KernelPreference, ScaleCalculationMode).
"""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def install() -> None:
    """Import four packages by the loaders below; one that is imported already stays as it is."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        # In front of Python's own finders, which would find the packages first.
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the four packages in the usual way, but loads them with the loaders below."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        loaders = {
            "torch": _Loader,
            "torchmetrics": _LightLoader,
            "litgpt": _BindingLoader,
            "torchao": _QuietLoader,
        }
        if name not in loaders:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = loaders[name](spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Executes a package, with all that it imports, without garbage collection."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        was_enabled = gc.isenabled()
        gc.disable()
        try:
            self._loader.exec_module(module)
        finally:
            if was_enabled:
                gc.enable()


class _BindingLoader(_Loader):
    """Makes modules that ``import_litgpt_module`` imported before their package attributes of the package."""

    def exec_module(self, module: ModuleType) -> None:
        for name in ("args", "config"):
            if f"litgpt.{name}" in sys.modules:
                setattr(module, name, sys.modules[f"litgpt.{name}"])
        super().exec_module(module)


class _LightLoader(_Loader):
    """Executes torchmetrics while lightning's availability checks answer no."""

    def exec_module(self, module: ModuleType) -> None:
        from lightning_utilities.core import imports

        original_check = imports.RequirementCache.__bool__
        original_function = imports.package_available

        def is_torch(check: imports.RequirementCache) -> bool:
            requirement = check.requirement or ""
            # torchmetrics chooses code by the versions of torch and of itself, so these answers stay true.
            return requirement.startswith(("torch>", "torch<", "torchmetrics")) and original_check(check)

        imports.RequirementCache.__bool__ = is_torch  # type: ignore[method-assign,assignment]
        imports.package_available = lambda name: name == "numpy"  # type: ignore[assignment]
        try:
            super().exec_module(module)
        finally:
            # Other packages ask the same functions later.
            imports.RequirementCache.__bool__ = original_check  # type: ignore[method-assign]
            imports.package_available = original_function


class _QuietLoader(_Loader):
    """Executes torchao, and leaves out torch's messages that its enums are registered in an outdated way."""

    def exec_module(self, module: ModuleType) -> None:
        # Not only now: some of its modules are imported later.
        logging.getLogger("torch.utils._pytree").addFilter(_is_for_users)
        super().exec_module(module)


def _is_for_users(record: logging.LogRecord) -> bool:
    about = record.args[0] if isinstance(record.args, tuple) and record.args else None
    is_of_torchao = getattr(about, "__module__", "").startswith("torchao.")
    return not (is_of_torchao and "is an Enum subclass" in record.msg)


def import_litgpt_module(name: str) -> Any:
    """Import ``litgpt.NAME`` without ``litgpt/__init__.py``, which imports torch and lightning.

    The module is registered under its name, so that a later ``import litgpt`` uses the same classes. Only for modules
    that import nothing heavy: ``args`` and ``config``, which LitGPT keeps light for this purpose.
    """
    full_name = f"litgpt.{name}"
    if full_name in sys.modules:
        return sys.modules[full_name]
    package = importlib.util.find_spec("litgpt")  # does not import it
    if package is None or package.origin is None:
        raise ModuleNotFoundError("litgpt is not installed")
    spec = importlib.util.spec_from_file_location(full_name, Path(package.origin).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs: a dataclass looks up its own module there.
    sys.modules[full_name] = module
    spec.loader.exec_module(module)
    return module
