"""The old name of the package ``litmoe``, kept for one release: ``from recipe import load``."""

import warnings

from litmoe import load

__all__ = ["load"]

warnings.warn("the package `recipe` is named `litmoe` now: from litmoe import load", DeprecationWarning, stacklevel=2)
