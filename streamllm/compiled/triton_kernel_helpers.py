"""What kernels have only when they are compiled for an NVIDIA GPU: an early start, and conversions in PTX.

Triton's interpreter runs no PTX, so kernels take these as constants: EARLY is 0 and PTX is False there.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# A byte b between other bytes of the float 2^23 is 2^23 + b. The top bit is flipped before: b = number + 128.
# The conversion instruction runs at a quarter of the rate of these.
_TO_FLOATS = tl.constexpr("""{
.reg .b32 bytes;
xor.b32 bytes, $4, 0x80808080;
prmt.b32 $0, bytes, 0x4B000000, 0x7440;
prmt.b32 $1, bytes, 0x4B000000, 0x7441;
prmt.b32 $2, bytes, 0x4B000000, 0x7442;
prmt.b32 $3, bytes, 0x4B000000, 0x7443;
add.f32 $0, $0, 0fCB000080;
add.f32 $1, $1, 0fCB000080;
add.f32 $2, $2, 0fCB000080;
add.f32 $3, $3, 0fCB000080;
}""")
# Whole numbers up to 256 are exact in the upper half of a float, which is a bfloat16.
_TO_BFLOATS = tl.constexpr("""{
.reg .b32 bytes;
.reg .f32 a, b, c, d;
xor.b32 bytes, $2, 0x80808080;
prmt.b32 a, bytes, 0x4B000000, 0x7440;
prmt.b32 b, bytes, 0x4B000000, 0x7441;
prmt.b32 c, bytes, 0x4B000000, 0x7442;
prmt.b32 d, bytes, 0x4B000000, 0x7443;
add.f32 a, a, 0fCB000080;
add.f32 b, b, 0fCB000080;
add.f32 c, c, 0fCB000080;
add.f32 d, d, 0fCB000080;
prmt.b32 $0, a, b, 0x7632;
prmt.b32 $1, c, d, 0x7632;
}""")


@triton.jit
def after_previous(EARLY: tl.constexpr):
    """Wait for the results of the previous kernel.

    EARLY: kernels are launched with launch_pdl, so a kernel may start before the previous one has ended. Until
    here, it reads only what no kernel of the step writes. Earlier kernels are complete here, too, because the previous
    one has waited for them. 1: the next kernel may start when all programs of this one are here; 2: when they are at
    `before_next`.
    """
    if EARLY > 0:
        gdc_wait()
        if EARLY == 1:
            gdc_launch_dependents()


@triton.jit
def before_next(EARLY: tl.constexpr):
    """See `after_previous`."""
    if EARLY == 2:
        gdc_launch_dependents()


@triton.jit
def to_float(x, PTX: tl.constexpr):
    """Numbers of a weight in float32."""
    if PTX and x.dtype == tl.int8:
        x = tl.inline_asm_elementwise(
            asm=_TO_FLOATS,
            constraints="=f,=f,=f,=f,r",
            args=[x],
            dtype=tl.float32,
            is_pure=True,
            pack=4,
        )
    return x.to(tl.float32)


@triton.jit
def int8_to(x, dtype: tl.constexpr, PTX: tl.constexpr):
    """int8 numbers in another type, exactly."""
    if PTX:
        if dtype == tl.bfloat16:
            x = tl.inline_asm_elementwise(
                asm=_TO_BFLOATS,
                constraints="=r,=r,r",
                args=[x],
                dtype=tl.bfloat16,
                is_pure=True,
                pack=4,
            )
        else:
            x = to_float(x, PTX)
    return x.to(dtype)
