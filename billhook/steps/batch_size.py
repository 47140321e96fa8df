"""How many rows of calibration samples pass through a block at once."""

from collections.abc import Sequence

from billhook.architectures.layers import Layer

TOKENS_A_BATCH = 4096  # enough rows to keep a matrix product busy
ACTIVATION_BYTES = 16 << 20  # activations of the widest layer of a block; more needs memory and is not faster on a CPU


def batch_size(layers: Sequence[Layer], length: int) -> int:
    """Rows in a batch: about 4096 tokens, or fewer where layers are wide."""
    widest = max(max(layer.shape) for layer in layers)
    return max(1, min(TOKENS_A_BATCH, ACTIVATION_BYTES // (4 * widest)) // length)
