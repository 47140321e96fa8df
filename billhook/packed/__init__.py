"""The packed format: read, write, check, unpack, load as a model, and benchmark (`steps/pack.py` packs directories)."""
