"""Adaptive nonlinear low-rank compression (NLA) of large models, and the baselines with which it is compared.

`import nla` is light: it imports neither torch nor transformers. It makes transformers able to load compressed folders
(`AutoModelForCausalLM.from_pretrained(folder)`), as soon as transformers itself is imported.

The functions `save_compressed`, `load_compressed` and `optimise_for_inference` are imported when they are used.
"""

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

FUNCTIONS = {
    "save_compressed": "nla.saved.save",
    "load_compressed": "nla.saved.load",
    "optimise_for_inference": "nla.compressed.inference",
}
REGISTRY = "transformers.quantizers.auto"  # transformers' table of storage formats
OURS = "nla.saved.quantizer"  # adds the format of this project to it


__all__ = [*FUNCTIONS]


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]


def __getattr__(name: str) -> Any:
    """The functions of FUNCTIONS, such as `nla.load_compressed`, imported when they are used."""
    if name in FUNCTIONS:
        return getattr(import_module(FUNCTIONS[name]), name)
    raise AttributeError(f"module 'nla' has no attribute {name!r}")


class AfterRegistry(MetaPathFinder):
    """Waits for the import of REGISTRY, and imports OURS after it."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                import_module(OURS)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


if REGISTRY in sys.modules:
    import_module(OURS)
else:
    sys.meta_path.insert(0, AfterRegistry())
