"""Files on disk: atomic writes, safetensors and GGUF at byte level, model directories, records."""
