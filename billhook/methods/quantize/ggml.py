"""The types of GGUF files as grids, by the names of `billhook.plan.storage`."""

from billhook.methods.quantize.code_books import CodeBook
from billhook.methods.quantize.minimum import Affine, KMinimum
from billhook.methods.quantize.symmetric import Multipliers, PowerOfTwo, SuperBlock, Symmetric

_FITTED = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_THREE = (8, 25, 43)
_SIX_BITS, _ODD = Multipliers(-32, 31), Multipliers(1, 31, 2)

GGML: dict[str, Symmetric | Affine] = {
    grid.name: grid
    for grid in (
        Symmetric("q8_0", range(-127, 128)),
        Symmetric("q5_0", range(-16, 16)),
        Symmetric("q4_0", range(-8, 8)),
        Symmetric("iq4_nl", _FITTED),
        Affine("q5_1", 31),
        Affine("q4_1", 15),
        SuperBlock("q6_k", range(-32, 32), group=16, multipliers=Multipliers(-128, 127)),
        KMinimum("q5_k", 31, multipliers=Multipliers(0, 63)),
        KMinimum("q4_k", 15, multipliers=Multipliers(0, 63)),
        PowerOfTwo("mxfp4", (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)),
        SuperBlock("iq4_xs", _FITTED, multipliers=_SIX_BITS),
        SuperBlock("q3_k", range(-4, 4), group=16, multipliers=_SIX_BITS),
        CodeBook("iq3_s", (1, 3, 5, 7, 9, 11, 13, 15), multipliers=_ODD, dim=4),
        CodeBook("iq3_xxs", (4, 12, 20, 28, 36, 44, 52, 62), multipliers=_ODD, unit=1 / 4, dim=4, even=True),
        KMinimum("q2_k", 3, group=16, multipliers=Multipliers(0, 15)),
        CodeBook("iq2_s", _THREE, group=16, multipliers=_ODD, unit=1 / 8),
        Symmetric("q2_0", range(-1, 3), block=64, group=64),
        CodeBook("iq2_xs", _THREE, group=16, multipliers=_ODD, unit=1 / 8, even=True),
        CodeBook("iq2_xxs", _THREE, multipliers=_ODD, unit=1 / 8, even=True),
    )
}
