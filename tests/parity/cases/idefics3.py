"""Idefics3 and SmolVLM: what speaks in them is a Llama."""

from cases.base import Case, base, without


def _idefics3(architecture: str, model_type: str, *, tied: bool = False, **text: object) -> dict[str, object]:
    said = without(base("", ""), "architectures", "model_type", "tie_word_embeddings", "torch_dtype")
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_token_id": 292,
        "scale_factor": 2,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "text_config": {"model_type": "llama", "pad_token_id": 3, "tie_word_embeddings": tied} | said | text,
        "vision_config": {
            "model_type": f"{model_type}_vision",
            "hidden_size": 16,
            "image_size": 8,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 2,
        },
    }


CASES = (
    Case("idefics3_text", _idefics3("Idefics3ForConditionalGeneration", "idefics3", rope_theta=500.0)),
    Case("smolvlm_text", _idefics3("SmolVLMForConditionalGeneration", "smolvlm", tied=True, rms_norm_eps=0.01)),
)
