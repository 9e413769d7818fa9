"""Tiny encoders of every family, with transformers' classes. Saved with a WordPiece tokenizer."""

from pathlib import Path
from typing import Any

WORDS = ("the", "cat", "sits", "on", "a", "mat", "stock", "markets", "fell", "##s", "hard", ".")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-5,
}
DISTILBERT = {
    "vocab_size": 40,
    "dim": 32,
    "hidden_dim": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_position_embeddings": 64,
}
THREE = {"num_labels": 3}

# Name -> class of transformers, fields of its config.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", TINY),
    "bert with relu and one token type": (
        "BertModel",
        {**TINY, "hidden_act": "relu", "type_vocab_size": 1},
    ),
    "bert for masked words": ("BertForMaskedLM", TINY),
    "roberta": ("RobertaModel", TINY),
    "roberta, padding token 3": ("RobertaModel", {**TINY, "pad_token_id": 3}),
    "xlm-roberta": ("XLMRobertaModel", TINY),
    "distilbert": ("DistilBertModel", DISTILBERT),
    "bert, labels": ("BertForSequenceClassification", {**TINY, **THREE}),
    "bert, one label": ("BertForSequenceClassification", {**TINY, "num_labels": 1}),
    "roberta, labels": ("RobertaForSequenceClassification", {**TINY, **THREE}),
    "xlm-roberta, labels": ("XLMRobertaForSequenceClassification", {**TINY, **THREE}),
    "distilbert, labels": ("DistilBertForSequenceClassification", {**DISTILBERT, **THREE}),
}


def save_tiny_encoder(directory: Path, name: str, fields: dict[str, Any]) -> Any:
    """Save a random model whose every weight is random, and a tokenizer; return the model."""
    import torch
    import transformers

    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**fields)).float().eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            offset = 1.0 if "norm.weight" in parameter_name.lower() else 0.0
            parameter.copy_(offset + 0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    save_wordpiece_tokenizer(directory)
    return model


def save_wordpiece_tokenizer(directory: Path) -> None:
    """Save a tokenizer of ``WORDS`` with BERT's special tokens and token types."""
    import tokenizers
    import transformers
    from tokenizers import models, normalizers, pre_tokenizers, processors

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *WORDS))}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]",
        sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(directory)  # fmt: skip
