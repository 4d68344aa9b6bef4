"""transformers without torch's compiler and distributed tensors, which nothing here uses: 1.6 of 3.8 CPU seconds of imports.

To be imported before transformers' models. `torch._dynamo` is then a module that knows the few markers which transformers and
torch's optimizers put on functions for the compiler. When anything else of it is wanted (`torch.compile`, FSDP, a file in it), it
becomes the real module, in place.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.abc import Loader
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed
from transformers.utils import import_utils

_NAME = "torch._dynamo"


class _Markers(ModuleType):
    """Outside of a compilation the markers do nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _become_real(self)
        return getattr(self, name)

    @staticmethod
    def disable(fn: Callable[..., Any] | None = None, *args: Any, **options: Any) -> Any:
        return fn or (lambda function: function)

    @staticmethod
    def allow_in_graph(fn: Callable[..., Any]) -> Callable[..., Any]:
        return fn

    assume_constant_result = allow_in_graph

    @staticmethod
    def graph_break(msg: str = "") -> None:
        pass


def _become_real(module: ModuleType) -> None:
    if type(module) is _Markers:
        module.__class__ = ModuleType  # type: ignore[assignment]
        spec = module.__spec__
        assert spec is not None and spec.loader is not None
        spec.loader.exec_module(module)


class _Files:
    """A file of the package is imported after the package, as always; this finder comes to know of it first."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not name.startswith(f"{_NAME}.") or type(sys.modules[_NAME]) is not _Markers:
            return None
        _become_real(sys.modules[_NAME])
        return spec_from_loader(name, _AlreadyLoaded(sys.modules[name])) if name in sys.modules else None


class _AlreadyLoaded(Loader):
    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # the import has put its own there


def _install() -> None:
    markers = _Markers(_NAME)
    spec = PathFinder.find_spec(_NAME, torch.__path__)
    assert spec is not None
    markers.__spec__, markers.__path__ = spec, spec.submodule_search_locations or []
    sys.modules[_NAME] = torch._dynamo = markers
    importlib.import_module(f"{_NAME}._trace_wrapped_higher_order_op")  # transformers' masks take a class from it
    sys.meta_path.insert(0, _Files)
    with patch.object(torch.distributed, "is_available", lambda: False):
        import_utils.is_torch_distributed_available()  # it remembers the answer; shards of a policy are the trainer's affair


if _NAME not in sys.modules and find_spec("vllm") is None:  # vLLM compiles
    _install()
