"""Folders of the repository that tests read."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
DATA = TESTS / "data"  # files of earlier versions
DEMO = ROOT / "billhook" / "demo_model"
