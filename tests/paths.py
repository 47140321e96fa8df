"""Where tests are: folders of the repository, and the processor."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA = TESTS / "data"  # files of earlier versions
DEMO = ROOT / "billhook" / "demo_model"


def is_intel() -> bool:
    """Whether MKL uses its code for Intel's processors here."""
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "GenuineIntel" in facts.read_text(encoding="utf-8")
