"""Files of other programs: compressed-tensors directories and GGUF files."""
