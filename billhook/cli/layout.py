"""How help looks: commands in groups with their whole first line, and arguments named in capitals."""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

GROUPS = {
    "Make a smaller model": ("compress", "quantize", "prune", "slim", "recover", "search"),
    "Decide what to remove": ("measure", "gradients", "plan", "compare"),
    "Check the result": ("eval", "verify", "report", "plot"),
    "Deploy it": ("pack", "unpack", "export", "imatrix", "generate", "bench"),
    "Learn": ("demo", "ls"),
}


class Command(TyperCommand):
    """A command whose usage line shows arguments without braces."""

    def collect_usage_pieces(self, context: Any) -> list[str]:
        """The pieces of the usage line."""
        return [re.sub(r"\{(.*?)\}", r"\1", piece) for piece in super().collect_usage_pieces(context)]


class Commands(TyperGroup):
    """The program, whose help shows its commands in groups; one that is in none comes last."""

    def format_commands(self, context: Any, formatter: Any) -> None:
        """Write the groups."""
        known = {name for names in GROUPS.values() for name in names}
        others = tuple(name for name in self.list_commands(context) if name not in known)
        for title, names in {**GROUPS, "Others": others}.items():
            rows = [(name, self.commands[name].get_short_help_str(1000)) for name in names if name in self.commands]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
