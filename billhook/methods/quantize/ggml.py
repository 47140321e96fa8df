"""The types of GGUF files as grids, by the names of `billhook.plan.storage`."""

from billhook.methods.quantize.code_books import CodeBook
from billhook.methods.quantize.minimum import Affine, KMinimum
from billhook.methods.quantize.symmetric import Integers, Multipliers, Points, PowerOfTwo, SuperBlock, Symmetric

_FITTED = Points((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_THREE = Points((8, 25, 43))
_SIX_BITS, _ODD = Multipliers(-32, 31), Multipliers(1, 31, 2)

GGML: dict[str, Symmetric | Affine] = {
    grid.name: grid
    for grid in (
        Symmetric("q8_0", Integers(-127, 127)),
        Symmetric("q5_0", Integers(-16, 15)),
        Symmetric("q4_0", Integers(-8, 7)),
        Symmetric("iq4_nl", _FITTED),
        Affine("q5_1", 31),
        Affine("q4_1", 15),
        SuperBlock("q6_k", Integers(-32, 31), group=16, multipliers=Multipliers(-128, 127)),
        KMinimum("q5_k", 31, multipliers=Multipliers(0, 63)),
        KMinimum("q4_k", 15, multipliers=Multipliers(0, 63)),
        PowerOfTwo("mxfp4", Points((-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12))),
        SuperBlock("iq4_xs", _FITTED, multipliers=_SIX_BITS),
        SuperBlock("q3_k", Integers(-4, 3), group=16, multipliers=_SIX_BITS),
        CodeBook("iq3_s", Points((1, 3, 5, 7, 9, 11, 13, 15)), multipliers=_ODD, dim=4),
        CodeBook("iq3_xxs", Points((4, 12, 20, 28, 36, 44, 52, 62)), multipliers=_ODD, unit=1 / 4, dim=4, even=True),
        KMinimum("q2_k", 3, group=16, multipliers=Multipliers(0, 15)),
        CodeBook("iq2_s", _THREE, group=16, multipliers=_ODD, unit=1 / 8),
        Symmetric("q2_0", Integers(-1, 2), block=64, group=64),
        CodeBook("iq2_xs", _THREE, group=16, multipliers=_ODD, unit=1 / 8, even=True),
        CodeBook("iq2_xxs", _THREE, multipliers=_ODD, unit=1 / 8, even=True),
    )
}
