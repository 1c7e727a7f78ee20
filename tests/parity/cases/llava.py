"""LLaVA: what speaks in it is another model."""

from cases.base import Case, base, without

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "image_size": 8,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "patch_size": 4,
    "projection_dim": 8,
}


def _llava(*, tied: bool = False, **text: object) -> dict[str, object]:
    said = without(base("", ""), "architectures", "model_type", "tie_word_embeddings", "torch_dtype")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 292,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "text_config": said | text,
        "vision_config": VISION,
        "vision_feature_layer": -1,
    }


CASES = (
    Case("llava_llama", _llava(model_type="llama", rope_theta=500.0)),
    Case("llava_mistral", _llava(model_type="mistral", sliding_window=8, head_dim=12)),
    Case("llava_qwen2", _llava(tied=True, model_type="qwen2", rope_theta=700.0)),
)
