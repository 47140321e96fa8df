"""Published ways to train a pruned model, by name: `billhook recover --recipe NAME`.

Both are LoRA of rank 8 with alpha 16 on the query and value projections, with the loss of the next token alone: a rate
of 1e-4, reached in 5 steps and falling to zero as a line, 128 windows a step, and one pass over the text.

* `alphapruning-lora` (and Wanda's with 30,000 windows of 1024 tokens): 100,000 windows of 2048 tokens of C4.
* `atp-lora`: 10,000 samples of Alpaca-GPT4. What that paper does not say is as above.

Differences: the product is masked, so that the adapters can be merged; published adapters stay apart, because merging
them would lose the zeros. There is no dropout (published: 0.05), and the moments of Adam have decays of 0.8 and
0.95 (0.9 and 0.999). A text that is shorter is read once all the same.
"""

from dataclasses import dataclass
from typing import Any

from billhook.errors import BillhookError
from billhook.registry import hint


@dataclass(frozen=True)
class Recipe:
    """Fields of a request (`billhook.steps.recover_job.RecoverRequest`), and where they are from."""

    windows: int
    source: str
    tune: str = "adapters"
    rank: int = 8
    objective: str = "text"
    rate: float = 1e-4
    length: int = 2048
    batch_size: int = 128
    targets: tuple[str, ...] = (r"re:.*\.(q_proj|v_proj)$",)

    def fields(self) -> dict[str, Any]:
        """The fields by name."""
        return {k: v for k, v in vars(self).items() if k not in ("windows", "source")}


RECIPES = {
    "alphapruning-lora": Recipe(100_000, "Lu et al., 2024, arXiv:2410.10912"),
    "atp-lora": Recipe(10_000, "Huang et al., 2025, arXiv:2502.14770"),
}


def recipe(name: str) -> Recipe:
    """A recipe by name; raises BillhookError for an unknown one."""
    if name not in RECIPES:
        raise BillhookError(f"Unknown recipe {name!r}.{hint(name, RECIPES)} There are: {', '.join(RECIPES)}.")
    return RECIPES[name]
