"""Triton's interpreter, almost twice as fast: the kernels' tests spend their time in it.

For every function that a kernel calls, it goes through `triton.language` to replace what must be
replaced, and for every value it makes a table of all types. Here it does so once for a launch, and
once for a type.
"""

from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Both of the modules that functions see, Triton's own ones too.
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def hasten() -> None:
    """For this process. What the kernels compute stays the same, to the bit."""
    replace, scalar_type = interpreter._patch_lang, cache(interpreter._get_np_dtype)

    def np_type(type_: tl.dtype) -> np.dtype:
        scalar = type_.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else scalar_type(scalar)

    interpreter._patch_lang = lambda launched: replace(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(
        *args, **options
    )
    interpreter._get_np_dtype = np_type
