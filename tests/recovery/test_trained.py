"""The kept entries of a parameter, against its mask."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from billhook.recovery.trained import Kept

pytestmark = pytest.mark.gate
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4)


@given(SHAPES, st.sampled_from([0.0, 0.4, 1.0]), st.booleans(), st.integers(0, 99))
def test_values_and_gradients_are_those_of_the_mask_and_no_other_entry_changes(shape, density, turned, seed):
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(shape, generator=generator).bfloat16()
    weight = draw.transpose(0, -1).contiguous().transpose(0, -1) if turned else draw
    mask = torch.rand(shape, generator=generator) < density
    parameter = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
    kept = Kept("weight", parameter, torch.bfloat16, mask)
    assert torch.equal(kept.mask, mask)
    assert torch.equal(kept.values(), weight[mask].float())
    assert torch.equal(kept.gradient(weight * 3), (weight * 3)[mask].float())
    assert kept.held == (0 if mask.all() else 4 * kept.count)
    values = kept.values()
    kept.restore_(values + 1)
    assert torch.equal(values, weight[mask].float())
    assert torch.equal(parameter.detach(), torch.where(mask, weight + 1, weight))
    assert kept.came_back() == int(torch.count_nonzero(weight[~mask]))
