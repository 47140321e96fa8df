"""Documents for the tests of texts, and questions with several answers."""

import json
import random

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "naïve",
    "façades",
    "cost",
    "twelve",
]


def jsonl(path, texts) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def texts(count: int = 60) -> list[str]:
    """Documents of 0 to 300 letters, all different."""
    rng = random.Random(1)
    return ["".join(rng.choices("abcdefgh ", k=rng.randint(0, 300))) for _ in range(count)]


def questions(count: int = 24) -> list[dict]:
    """Items with two to four answers of different lengths, and prompts that end with and without a space."""
    found = []
    for i in range(count):
        context = " ".join(WORDS[(i * 5 + j * 3) % len(WORDS)] for j in range(4 + i % 5)) + (" " if i % 3 == 0 else "")
        answers = [f" {WORDS[(i + j) % len(WORDS)]}{' indeed' * (j % 2)}" for j in range(2 + i % 3)]
        found.append({"requests": [[context, answer] for answer in answers], "gold": i % len(answers)})
    return found
