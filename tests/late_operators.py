"""mmcv's operators in the server that forks commands (processes.py): a call is passed on to those of the command."""

import importlib
import os
import sys
from collections.abc import Callable

if os.environ.get("SEPVIT_OPERATORS") != "compiled":
    sys.modules["mmcv._ext"] = sys.modules[__name__]


def __getattr__(name: str) -> Callable:
    if name.startswith("_"):
        raise AttributeError(name)

    def operator(*args: object, **kwargs: object) -> object:
        return importlib.import_module("sepvit_lib.mm.operators").find_operator(name)(*args, **kwargs)

    return operator
