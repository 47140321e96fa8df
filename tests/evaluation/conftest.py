"""A model and its tokenizer for tests of evaluation."""

import pytest
import tiny


@pytest.fixture(scope="module")
def model():
    return tiny.llama()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()
