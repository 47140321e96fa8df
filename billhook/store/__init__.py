"""Files on disk: atomic writes, safetensors at byte level, model directories dense and packed.

Imports nothing of Billhook except `errors`.
"""
