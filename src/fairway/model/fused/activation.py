"""The MLP's activation, leaky_relu(·, slope)², and its derivative, in the registers of a kernel.

A backward pass needs nothing else: the derivative is 2·√a where the input of the activation `a` was
positive, else −2·slope·√a. The last mantissa bit of `a` is spent on that sign. Gluon's kernels call
these as well.
"""

import triton
import triton.language as tl


@triton.jit
def activation_of(x, SLOPE: tl.constexpr, dtype: tl.constexpr, SIGNED: tl.constexpr):
    """Of float32 x, as the nearest `dtype`, or where SIGNED as the nearest whose last mantissa bit
    tells x's sign."""
    LAST: tl.constexpr = _last_bit(dtype)
    # A NaN is none of these: rounding it up would overflow into a zero.
    is_positive = x >= 0
    leaky = tl.where(is_positive, x, SLOPE * x)
    if not SIGNED:
        return (leaky * leaky).to(dtype)
    bits = (leaky * leaky).to(tl.int32, bitcast=True)
    sign = tl.where(is_positive, 0, LAST)
    bits = ((bits + LAST - sign) & (-2 * LAST)) | sign
    return bits.to(tl.float32, bitcast=True).to(dtype)


@triton.jit
def derivative_of(a, SLOPE: tl.constexpr):
    """The activation's derivative, float32, from a result `a` of `activation_of`."""
    LAST: tl.constexpr = _last_bit(a.dtype)
    exact = a.to(tl.float32)
    root = tl.sqrt(exact)
    is_negative = (exact.to(tl.int32, bitcast=True) & LAST) != 0
    return tl.where(is_negative, -2 * SLOPE * root, 2 * root)


@triton.constexpr_function
def _last_bit(dtype):
    """The last mantissa bit of `dtype` in a float32, of which a bfloat16 is the upper half."""
    return {tl.float32: 1, tl.bfloat16: 0x10000}[dtype]
