"""Model families that are tested in every release, by the task of the model: `model_type` in config.json."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "text-generation": (
        *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "olmo2", "stablelm"),
        *("starcoder2", "cohere", "granite", "falcon", "gpt_neox", "gptj", "gpt2", "bloom", "mpt", "opt", "mixtral"),
        *("qwen3_moe", "gpt_oss", "llama4_text"),
    ),
    "image-text-to-text": (
        *("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "gemma3", "idefics3", "smolvlm"),
        *("paligemma", "internvl", "mllama", "blip-2", "mistral3", "aya_vision", "glm4v"),
    ),
    "image-classification": (
        *("vit", "deit", "beit", "dinov2", "dinov2_with_registers", "ijepa", "vit_msn", "swin", "swinv2", "convnext"),
        *("convnextv2", "pvt_v2", "clip", "siglip", "hiera", "resnet", "regnet"),
    ),
    "feature-extraction": ("bert", "dinov2"),
    "fill-mask": ("bert",),
    "text2text-generation": ("t5", "bart"),
    "automatic-speech-recognition": ("whisper",),
}
