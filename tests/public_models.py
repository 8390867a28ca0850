"""Sizes of the models that have a recipe, as in their public config.json, and their published parameter counts."""

import json

_LLAMA = dict(model_type="llama", vocab_size=128256, max_position_embeddings=131072)
_QWEN = dict(model_type="qwen2", vocab_size=151936, max_position_embeddings=32768)


def _sizes(hidden, intermediate, layers, heads, kv_heads, **others):
    return dict(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, **others,
    )  # fmt: skip


CONFIGS = {
    "llama-3.2-1b": _LLAMA | _sizes(2048, 8192, 16, 32, 8, head_dim=64, tie_word_embeddings=True),
    "llama-3.2-3b": _LLAMA | _sizes(3072, 8192, 28, 24, 8, head_dim=128, tie_word_embeddings=True),
    "llama-3.1-8b": _LLAMA | _sizes(4096, 14336, 32, 32, 8, head_dim=128, tie_word_embeddings=False),
    "qwen2.5-0.5b": _QWEN | _sizes(896, 4864, 24, 14, 2, tie_word_embeddings=True),
    "qwen2.5-1.5b": _QWEN | _sizes(1536, 8960, 28, 12, 2, tie_word_embeddings=True),
    "qwen2.5-3b": _QWEN | _sizes(2048, 11008, 36, 16, 2, tie_word_embeddings=True),
    "qwen2.5-7b": _QWEN | _sizes(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
    "gemma-2-9b": dict(model_type="gemma2", vocab_size=256000, max_position_embeddings=8192, tie_word_embeddings=True)
    | _sizes(3584, 14336, 42, 16, 8, head_dim=256),
    "gemma-3-4b": dict(
        model_type="gemma3",
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=dict(model_type="gemma3_text", vocab_size=262208, max_position_embeddings=131072)
        | _sizes(2560, 10240, 34, 8, 4, head_dim=256),
        vision_config=dict(
            model_type="siglip_vision_model", hidden_size=1152, intermediate_size=4304, num_hidden_layers=27,
            num_attention_heads=16, image_size=896, patch_size=14,
        ),
    ),
}  # fmt: skip
PUBLISHED = {
    "llama-3.2-1b": 1.24, "llama-3.2-3b": 3.21, "llama-3.1-8b": 8.03, "qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09, "qwen2.5-7b": 7.62, "gemma-2-9b": 9.24, "gemma-3-4b": 4.30,
}  # fmt: skip
"""Billions of parameters. 3.88 of Gemma 3's belong to the text decoder."""


def write_stand_ins(folder, tokenizer):
    """Write one folder per model, with its config, a small tokenizer, and no weights."""
    for name, config in CONFIGS.items():
        tokenizer.save_pretrained(folder / name)
        (folder / name / "config.json").write_text(json.dumps(config))
