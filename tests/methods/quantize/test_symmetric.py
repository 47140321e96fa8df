"""Points and multipliers: the nearest ones."""

import torch

from billhook.methods.quantize.ggml import GGML
from billhook.methods.quantize.symmetric import Multipliers
from billhook.runtime.plain_codes import nearest_code


def test_the_nearest_point_is_as_near_as_any_also_at_half_way_and_out_of_range():
    points = GGML["iq4_nl"].points
    values = torch.tensor(points).float()
    x = torch.cat([torch.arange(-600, 601) / 4, torch.randn(5000) * 60, torch.tensor([-1e9, 1e9])])
    found = nearest_code(x, points)
    assert torch.isin(found, values).all()
    assert torch.equal((x - found).abs(), (x[:, None] - values).abs().amin(1))


def test_multipliers_are_the_nearest_of_their_set_and_their_neighbours_stay_in_it():
    odd = Multipliers(1, 31, 2)
    x = torch.linspace(-5, 40, 1001)
    every = torch.arange(1, 32, 2).float()
    m = odd.nearest(x)
    assert torch.allclose((x - m).abs(), (x[:, None] - every).abs().amin(1), atol=1e-5)
    assert all(torch.isin(near, every).all() for near in odd.neighbours(m))
