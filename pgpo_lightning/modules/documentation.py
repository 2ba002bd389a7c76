"""Documentation of arguments that several modules take."""

import re
from typing import TypeVar

from pgpo_lightning.modules.on_policy import OnPolicyModule

Module = TypeVar("Module", bound=type[OnPolicyModule])


def with_common_args(cls: Module) -> Module:
    """Append what :class:`OnPolicyModule` says of its arguments to the docstring of a subclass that takes them too.

    ``help()`` and the command line then show every argument, and their texts are written once.
    """
    common = _args(OnPolicyModule.__doc__ or "")
    own = _args(cls.__doc__ or "")
    cls.__doc__ = (cls.__doc__ or "").replace(own, f"{own}{common}", 1)
    return cls


def _args(docstring: str) -> str:
    """Return the lines under ``Args:``."""
    found = re.search(r"^ *Args:\n((?: {8}.*\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""
