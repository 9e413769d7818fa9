"""Checkpoints that see images too give their class's logits for text, and say what they refuse."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jaxengine.convert.families import model_spec

from tests.helpers import TINY, hf_logits, our_logits

TOKENS = [int(t) for t in np.random.default_rng(3).integers(3, 128, 40)]
TEXT = {**TINY, "num_hidden_layers": 2, "head_dim": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 32,
}
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

CASES: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "text_config": {**TEXT, "query_pre_attn_scalar": 16, "sliding_window": 20},
        "vision_config": VISION,
        "mm_tokens_per_image": 4,
    },
    "Llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "projection_dim": 32, "model_type": "clip_vision_model"},
    },
    "Mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral"},
        "tie_word_embeddings": False,
    },
    "Qwen2_5_VL": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {**QWEN_VISION, "fullatt_block_indexes": [0]},
    },
    "Qwen3VL": {
        "text_config": {**TEXT, "rope_parameters": SECTIONS},
        "vision_config": {
            **QWEN_VISION,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 4,
        },
    },
}


def save_tiny_multimodal_model(directory: Path, family: str, fields: dict[str, Any]) -> Any:
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**fields)
    model_class = getattr(transformers, f"{family}ForConditionalGeneration")
    model = model_class._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if parameter.ndim == 1 and "norm" in name else 0.0
            parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize("family", CASES)
def test_text_has_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    model = save_tiny_multimodal_model(tmp_path, family, CASES[family])
    with pytest.warns(UserWarning, match=f"{family}ForConditionalGeneration: .*images are refused"):
        ours = our_logits(tmp_path, TOKENS, attention_backend="reference")
    assert np.abs(ours - hf_logits(model, TOKENS)).max() < 1e-4


@pytest.mark.filterwarnings("ignore:.*images are refused")
def test_a_published_config_may_leave_out_what_its_class_has() -> None:
    # As of gemma-3-4b-it.
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    spec = model_spec({"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text})
    attention = spec.layers[5].attention
    assert attention is not None
    assert (attention.num_heads, attention.num_kv_heads, attention.head_dim) == (8, 4, 256)
    assert (spec.vocab_size, spec.max_position_embeddings) == (262_208, 131_072)
    assert spec.head.is_tied


@pytest.mark.filterwarnings("ignore:.*images are refused")
def test_a_config_of_old_has_the_language_models_fields_beside_the_others() -> None:
    config = {**TEXT, "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
    config |= {"model_type": "qwen2_5_vl", "rope_scaling": {"type": "mrope", "mrope_section": [1]}}
    spec = model_spec({**config, "tie_word_embeddings": True})
    assert spec.layers[0].attention is not None
    assert spec.layers[0].attention.qkv_bias
    assert spec.head.is_tied


def test_another_language_model_is_refused_by_name() -> None:
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "text_config": {"model_type": "x"},
    }
    with pytest.raises(ValueError, match="language model of type 'x': supported are gemma3_text, "):
        model_spec(config)
