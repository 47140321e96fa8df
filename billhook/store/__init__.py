"""What lies on disk: files that appear whole or not at all, safetensors byte by byte, model directories dense and
packed.

Imports nothing of Billhook but `errors`.
"""
