"""Each layer gets the statistics of its own inputs, also where tensors change in place or are short-lived."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from billhook import JobError
from billhook.architectures.layers import Layer
from billhook.engine.observer import Observer

WIDTH = 8


class Busy(nn.Module):
    """Layers with one input, with the same tensor changed in place, and with temporary tensors of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.names = ("a", "same", "changed", "same_again", "view", "temporary", "another", "last")
        for name in self.names:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x: Tensor, together: bool = True) -> Tensor:
        x = x.clone()
        out = self.a(x) + self.same(x if together else x.clone())
        x.mul_(torch.arange(WIDTH))
        out += self.changed(x) + self.same_again(x)
        out += self.view(x.flip(-1)[:, :3]).sum(1, keepdim=True)
        out += self.temporary(x * 3)
        out += self.another(x * 5)  # may get the memory of the temporary tensor before it
        out[0] = 0
        return self.last(out)


def observed(batches: list[Tensor], together: bool = True) -> tuple[Observer, dict[str, list[Tensor]]]:
    """An observer that has seen the batches, and copies of the layers' inputs."""
    block = Busy()
    layers = [Layer(name, 0, name, getattr(block, name), "weight", None, False) for name in block.names]
    seen: dict[str, list[Tensor]] = {name: [] for name in block.names}
    for name in block.names:
        getattr(block, name).register_forward_pre_hook(lambda _, args, n=name: seen[n].append(args[0].clone()))
    observer = Observer(layers, ("input_norm", "gram", "input_mean"), True, sum(map(len, batches)))
    with torch.no_grad():
        for number, batch in enumerate(batches):
            with observer:
                block(batch, together or number == 0)
    return observer, seen


def test_statistics_are_those_of_the_inputs_at_the_time_of_the_call() -> None:
    batches = list(torch.randn(6, 5, WIDTH, generator=torch.Generator().manual_seed(0)).split(2))
    observer, seen = observed(batches)
    for name, stats in observer.stats().items():
        x = torch.cat(seen[name]).flatten(0, 1).double()
        torch.testing.assert_close(stats.gram.double(), x.T @ x, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stats.input_mean.double(), x.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(stats.input_norm.double(), (x.square().sum(0) / 6).sqrt(), rtol=1e-5, atol=1e-6)
        assert (stats.tokens, stats.sequences) == (len(x), 6)
    groups = [[layer.name for layer in group] for group in observer.groups()]
    assert groups == [["a", "same"], ["changed", "same_again"], ["view"], ["temporary"], ["another"], ["last"]]


def test_layers_that_share_their_input_in_some_batches_only_are_refused() -> None:
    with pytest.raises(JobError, match="same shares its input with other layers in some batches only"):
        observed([torch.randn(2, 5, WIDTH)] * 2, together=False)


@torch.no_grad()
def test_experts_in_one_product_see_the_tokens_that_they_receive():
    experts = Llama4TextExperts(Llama4TextConfig(num_local_experts=3, hidden_size=8, intermediate_size=16))
    for parameter in experts.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    layers = [
        Layer(f"{name}.{expert}", 0, name, experts, name, expert, True)
        for name in ("gate_up_proj", "down_proj")
        for expert in range(3)
    ]
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
    received = torch.tensor([[1, 0, 1, 0, 1], [0, 1, 0, 1, 0], [0, 0, 0, 0, 0]]).bool()
    observer = Observer(layers, ("gram", "input_norm"), True, 1)
    with observer:
        experts((x * received[..., None]).flatten(0, 1))
    stats = observer.stats()
    for expert, rows in enumerate(received):
        own = x[expert][rows]
        gate, up = (own @ experts.gate_up_proj[expert]).chunk(2, -1)
        for name, inputs in {"gate_up_proj": own, "down_proj": up * experts.act_fn(gate)}.items():
            found = stats[f"{name}.{expert}"]
            assert found.tokens == len(own)
            torch.testing.assert_close(found.gram, inputs.T @ inputs, rtol=1e-4, atol=1e-4)
