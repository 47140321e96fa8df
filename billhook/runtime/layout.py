"""The layout of a packed weight in memory, which the kernels and the packed format share. Imports no torch.

A weight W [out, in] is a bitmask, uint8 [out, 8 * ceil(in / 64)], in which bit j % 8 of byte j // 8 of a row is set
where column j is kept and padding bits are zero, and its kept values in row-major order, 1-D, followed by 64 bytes of
zeros. int8 values have float32 scales: [out], or [out, ceil(in / group)] where `group` columns share a scale.
"""

PADDING = 64  # bytes of zeros behind the values, so that a wide load of the last value stays inside
MIN_GROUP = 64  # columns that share a scale: this many times a power of two


def mask_bytes(columns: int) -> int:
    """Bytes of bitmask per row: whole 64-bit words."""
    return 8 * -(-columns // 64)
