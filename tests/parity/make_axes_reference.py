"""Write tests/models/ops/axes_reference.json: by which axis each pair turns, as transformers' rotary embeddings do it.

python tests/parity/make_axes_reference.py
"""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLTextConfig, Qwen3_5TextConfig, Qwen3VLTextConfig, logging
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRotaryEmbedding
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

TARGET = Path(__file__).parents[1] / "models" / "ops" / "axes_reference.json"

SECTIONS = (Qwen2_5_VLTextConfig, Qwen2_5_VLRotaryEmbedding)
TURNS = (Qwen3VLTextConfig, Qwen3VLTextRotaryEmbedding)
PART = (Qwen3_5TextConfig, Qwen3_5TextRotaryEmbedding)
SETTINGS: tuple[tuple[tuple[Any, Any], int, dict[str, Any]], ...] = (
    (SECTIONS, 128, {"mrope_section": [16, 24, 24], "type": "mrope"}),
    (SECTIONS, 16, {"mrope_section": [1, 3, 4], "rope_type": "default"}),
    (SECTIONS, 16, {"mrope_section": [2, 1, 1, 2, 1, 1], "rope_type": "default"}),
    (TURNS, 128, {"mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_type": "default"}),
    (TURNS, 16, {"mrope_section": [2, 1, 5], "mrope_interleaved": True, "rope_type": "default"}),
    (PART, 256, {"mrope_section": [11, 11, 10], "mrope_interleaved": True, "partial_rotary_factor": 0.25}),
    (PART, 32, {"mrope_section": [6, 0, 2], "mrope_interleaved": True, "partial_rotary_factor": 0.5}),
)


def main() -> None:
    logging.set_verbosity_error()
    entries = []
    for (config_of, embedding_of), head_dim, settings in SETTINGS:
        config = config_of(
            head_dim=head_dim, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | settings
        )
        rope = embedding_of(config)
        # Frequencies that say which axis they are of.
        axes = torch.arange(3.0)[:, None, None, None].expand(3, 1, 1, len(rope.inv_freq)).clone()
        found = rope.recomposition_frequencies(axes)[0, 0, : len(rope.inv_freq)]
        entries.append({"head_dim": head_dim, "settings": settings, "axes": found.int().tolist()})
    TARGET.write_text("[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n")


if __name__ == "__main__":
    main()
