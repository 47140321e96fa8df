"""Documents for the tests of texts."""

import json
import random


def jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def texts(count: int = 60) -> list[str]:
    """Documents of 0 to 300 letters, all different."""
    rng = random.Random(1)
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(0, 300))) for _ in range(count)]
