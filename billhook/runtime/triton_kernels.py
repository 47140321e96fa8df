"""Triton kernels that multiply with, or expand, a weight held as bitmask and values.

One lane handles one byte of the bitmask, which is eight columns; a warp handles a chunk of 32 bytes, 256 columns. The
position of a chunk's first value is read from a table made at load; that of a lane's first value follows from a
running count of set bits over the warp, two rows in one word. For each half of its eight columns a lane reads four
consecutive values without looking at the bits; a staircase of selects moves each value to its column, and what stands
in a column whose bit is clear is never used. That is about ten instructions per 32 columns of a warp, compiled for
Hopper; a load with its own address and predicate for every column takes fifteen, and on such a card instructions, not
bytes, are the limit.

At most three values beyond the last are read, which is why the packed values end in 64 bytes of zeros. Offsets have 32
bits: a weight may have at most 2**31 - 1 kept values. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

CHUNK = tl.constexpr(256)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _ones(bits):
    """Set bits among the low eight."""
    if _INTERPRETED:  # the interpreter has no libdevice
        pairs = bits - ((bits >> 1) & 0x55)
        halves = (pairs & 0x33) + ((pairs >> 2) & 0x33)
        return (halves + (halves >> 4)) & 0xF
    return libdevice.popc(bits)


@triton.jit
def _half(values, at, bits):
    """The values from position `at` for four columns, [..., 2, 2], and which of them the low four `bits` keep."""
    place = values + at
    a, b, c, d = tl.load(place), tl.load(place + 1), tl.load(place + 2), tl.load(place + 3)
    keep0, keep1, keep2, keep3 = (bits & 1) != 0, (bits & 2) != 0, (bits & 4) != 0, (bits & 8) != 0
    w0 = a
    a, b, c = tl.where(keep0, b, a), tl.where(keep0, c, b), tl.where(keep0, d, c)
    w1 = a
    a, b = tl.where(keep1, b, a), tl.where(keep1, c, b)
    w2 = a
    w3 = tl.where(keep2, b, a)
    return tl.join(tl.join(w0, w2), tl.join(w1, w3)), tl.join(tl.join(keep0, keep2), tl.join(keep1, keep3))


@triton.jit
def _columns(low, high):
    """Two halves [R, S, 32, 2, 2] as rows of columns [R, S * 256]."""
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 2, 5, 3, 4)), [low.shape[0], low.shape[1] * CHUNK])


@triton.jit
def _running(count):
    """Inclusive prefix sums of count [R, S, 32] over the last axis; two rows, below 2**16 each, share a scan."""
    R: tl.constexpr = count.shape[0]
    S: tl.constexpr = count.shape[1]
    first, second = tl.split(tl.permute(tl.reshape(count, [R // 2, 2, S, 32]), (0, 2, 3, 1)))
    both = tl.cumsum(first + (second << 16), 2)
    return tl.reshape(tl.permute(tl.join(both & 0xFFFF, both >> 16), (0, 3, 1, 2)), [R, S, 32])


@triton.jit
def _fetch(mask, table, row, chunk, rows, stride, chunks):
    """Bytes of bitmask [R, S, 32] and positions of first values [R, S] for rows `row` [R] and chunks `chunk` [S]."""
    row = tl.minimum(row, rows - 1).to(tl.int64)
    byte = chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
    # The contiguities given here and below only set the order of a warp's lanes, and it must be one for all loads, or
    # the compiler exchanges tiles through shared memory. No load is widened: stride is unspecialized and `at` unknown,
    # so no alignment is known.
    place = tl.max_contiguous(row[:, None, None] * stride + byte[None], [1, 2, 32])
    bits = tl.load(mask + place, mask=(byte < stride)[None], other=0)
    return bits, tl.load(table + row[:, None] * chunks + chunk[None], mask=(chunk < chunks)[None], other=0)


@triton.jit
def _tile(bits, start, values, scales, row, chunk, rows, groups, GROUP: tl.constexpr):
    """The chunks that `_fetch` read, [R, S * 256]: values (float32 with scales), and which of them are kept."""
    bits = bits.to(tl.int32)
    count = _ones(bits)
    at = start[:, :, None] + _running(count) - count
    low, keep_low = _half(values, tl.max_contiguous(at, [1, 2, 4]), bits)
    high, keep_high = _half(values, tl.max_contiguous(at + _ones(bits & 0xF), [1, 2, 4]), bits >> 4)
    if GROUP > 0:
        group = (chunk[:, None] * 32 + tl.arange(0, 32)[None, :]) * 8 // GROUP
        place = tl.minimum(row, rows - 1).to(tl.int64)[:, None, None] * groups + group[None]
        scale = tl.load(scales + place, mask=(group < groups)[None], other=0)[:, :, :, None, None]
        low, high = low.to(tl.float32) * scale, high.to(tl.float32) * scale
    return _columns(low, high), _columns(keep_low, keep_high)


@triton.jit(do_not_specialize=["stride"])
def matvec(
    mask, values, table, scales, bias, x, y, rows, columns, stride, chunks, groups,
    ROWS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y [rows] = W x (+ bias) for x [columns]: a program handles ROWS rows, each warp every SPAN-th chunk."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, SPAN * CHUNK], tl.float32)
    chunk = tl.arange(0, SPAN)
    bits, start = _fetch(mask, table, row, chunk, rows, stride, chunks)
    for first in range(0, chunks, SPAN):
        # the next chunk's loads are issued before this one's values are used
        next_bits, next_start = _fetch(mask, table, row, chunk + SPAN, rows, stride, chunks)
        w, keep = _tile(bits, start, values, scales, row, chunk, rows, groups, GROUP)
        bits, start, chunk = next_bits, next_start, chunk + SPAN
        column = first * CHUNK + tl.arange(0, SPAN * CHUNK)
        v = tl.load(x + column, mask=column < columns, other=0).to(tl.float32)
        total = tl.where(keep, total + w.to(tl.float32) * v[None], total)
    result = tl.sum(total, 1)
    if BIAS:
        result += tl.load(bias + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(y + row, result.to(y.dtype.element_ty), mask=row < rows)


@triton.jit(do_not_specialize=["stride"])
def matmat(
    mask, values, table, scales, x, parts, rows, columns, stride, chunks, groups, tokens, share,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """parts [splits, tokens, rows] = x Wᵀ over each split's `share` chunks, for x [tokens <= TOKENS, columns]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    total = tl.zeros([ROWS, TOKENS], tl.float32)
    first = tl.program_id(1) * share
    chunk = first + tl.arange(0, 1)
    bits, start = _fetch(mask, table, row, chunk, rows, stride, chunks)
    for number in range(first, tl.minimum(first + share, chunks)):
        next_bits, next_start = _fetch(mask, table, row, chunk + 1, rows, stride, chunks)
        w, keep = _tile(bits, start, values, scales, row, chunk, rows, groups, GROUP)
        bits, start, chunk = next_bits, next_start, chunk + 1
        column = number * CHUNK + tl.arange(0, CHUNK)
        inside = (column < columns)[:, None] & (token < tokens)[None]
        v = tl.load(x + token[None] * columns + column[:, None], mask=inside, other=0)
        w = tl.where(keep, w, 0).to(v.dtype)
        if _INTERPRETED:  # the interpreter would multiply bfloat16 as integers here
            w, v = w.to(tl.float32), v.to(tl.float32)
        total = tl.dot(w, v, total, input_precision="ieee")
    place = (tl.program_id(1) * tokens + token[None]).to(tl.int64) * rows + row[:, None]
    tl.store(parts + place, total, mask=(row < rows)[:, None] & (token < tokens)[None])


@triton.jit(do_not_specialize=["stride"])
def expand(
    mask, values, table, scales, dense, rows, columns, stride, chunks, groups,
    ROWS: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dense [rows, columns] = W: a program writes ROWS rows of SPAN chunks."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    chunk = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    bits, start = _fetch(mask, table, row, chunk, rows, stride, chunks)
    w, keep = _tile(bits, start, values, scales, row, chunk, rows, groups, GROUP)
    column = tl.program_id(1) * SPAN * CHUNK + tl.arange(0, SPAN * CHUNK)
    place = row[:, None].to(tl.int64) * columns + column[None]
    inside = (row < rows)[:, None] & (column < columns)[None]
    tl.store(dense + place, tl.where(keep, w, 0).to(dense.dtype.element_ty), mask=inside)
