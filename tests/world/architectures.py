"""Small models of every kind that a stranger may bring: random weights, and the kind of tokenizer each is used with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "a heron stands in the river and waits for a fish",
    "The boat at the mooring needs a new rope; the harbour office closes at five.",
    "invoices are due in May, and the lamp on the quay is broken again!",
    "two words, three words and one question: who paints the crane?",
    "ein Boot am Steg, une barque au quai, 数学 and some numbers 12345 67890",
] * 4

WIDTH = 16


def word_piece() -> Tokenizer:
    """As of BERT."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special))
    return _surrounded(made, "[CLS]", "[SEP]")


def byte_level(
    *special: str, before: str | None = None, after: str | None = None, unknown: str | None = None
) -> Tokenizer:
    """As of GPT-2 and all that came of it."""
    made = Tokenizer(models.BPE(unk_token=unknown))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet)
    made.train_from_iterator(CORPUS, trainer)
    return _surrounded(made, before, after)


def lower_case_pairs() -> Tokenizer:
    """As of CLIP: lower case, byte pairs with an end of word, and an unknown token that also ends each text."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=special, end_of_word_suffix="</w>")
    )
    return _surrounded(made, *special)


def unigram(*special: str, before: str | None = None, after: str | None = None) -> Tokenizer:
    """As of SentencePiece."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=250, special_tokens=list(special), unk_token="<unk>")
    made.train_from_iterator(CORPUS, trainer)
    return _surrounded(made, before, after)


def _surrounded(made: Tokenizer, before: str | None, after: str | None) -> Tokenizer:
    """With special tokens around a text; several are given with blanks between them."""
    prefix, suffix = (before or "").split(), (after or "").split()
    if prefix or suffix:
        tokens = [(token, made.token_to_id(token)) for token in dict.fromkeys(prefix + suffix)]
        made.post_processor = processors.TemplateProcessing(
            single=" ".join([*prefix, "$A", *suffix]), special_tokens=tokens
        )
    return made


@dataclass(frozen=True)
class Kind:
    """How a model of one architecture is made.

    Attributes:
        config: Name of the config's class in transformers.
        sizes: Arguments of it, besides the vocabulary's size.
        tokenizer: Makes the tokenizer.
        names: Special tokens by the names transformers gives them, and further arguments of its tokenizer.
        pooling: How tokens become one vector.
    """

    config: str
    sizes: dict[str, Any]
    tokenizer: Callable[[], Tokenizer]
    names: dict[str, Any]
    pooling: str = "mean"


_BERT = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_BERT_NAMES = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_ROBERTA = {**_BERT, "max_position_embeddings": 66, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
_ROBERTA_NAMES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_END = "<|endoftext|>"


def _roberta_pairs() -> Tokenizer:
    return byte_level(*_ROBERTA_SPECIAL, before="<s>", after="</s>")


def _roberta_pieces() -> Tokenizer:
    return unigram(*_ROBERTA_SPECIAL, before="<s>", after="</s>")


def _deberta_pieces() -> Tokenizer:
    return unigram("[PAD]", "[CLS]", "[SEP]", "<unk>", "[MASK]", before="[CLS]", after="[SEP]")


KINDS: dict[str, Kind] = {
    "bert": Kind("BertConfig", _BERT, word_piece, _BERT_NAMES),
    "distilbert": Kind(
        "DistilBertConfig",
        {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
        word_piece,
        _BERT_NAMES,
        "cls",
    ),
    "electra": Kind("ElectraConfig", {**_BERT, "embedding_size": 8}, word_piece, _BERT_NAMES),
    "albert": Kind(
        "AlbertConfig",
        {**_BERT, "embedding_size": 8},
        lambda: unigram("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]", before="[CLS]", after="[SEP]"),
        {**_BERT_NAMES, "pad_token": "<pad>", "unk_token": "<unk>"},
    ),
    "roberta": Kind("RobertaConfig", _ROBERTA, _roberta_pairs, _ROBERTA_NAMES),
    "xlm-roberta": Kind("XLMRobertaConfig", _ROBERTA, _roberta_pieces, _ROBERTA_NAMES, "cls"),
    "mpnet": Kind("MPNetConfig", _ROBERTA, _roberta_pieces, _ROBERTA_NAMES, "max"),
    "longformer": Kind("LongformerConfig", {**_ROBERTA, "attention_window": [8, 8]}, _roberta_pairs, _ROBERTA_NAMES),
    "deberta-v2": Kind(
        "DebertaV2Config",
        {**_BERT, "relative_attention": True, "position_biased_input": False, "pos_att_type": "p2c|c2p"},
        _deberta_pieces,
        {**_BERT_NAMES, "unk_token": "<unk>"},
    ),
    "modernbert": Kind(
        "ModernBertConfig",
        {**_BERT, "global_attn_every_n_layers": 2, "pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3},
        lambda: byte_level("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", before="[CLS]", after="[SEP]"),
        _BERT_NAMES,
    ),
    "gpt2": Kind(
        "GPT2Config",
        {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64},
        lambda: byte_level(_END),
        {"bos_token": _END, "eos_token": _END, "unk_token": _END},
    ),
    "gpt-neox": Kind(
        "GPTNeoXConfig",
        {**_BERT, "rotary_pct": 0.5},
        lambda: byte_level(_END),
        {"bos_token": _END, "eos_token": _END, "unk_token": _END},
        "lasttoken",
    ),
    "opt": Kind(
        "OPTConfig",
        {
            "hidden_size": WIDTH,
            "word_embed_proj_dim": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 32,
            "max_position_embeddings": 64,
        },
        lambda: byte_level("<s>", "<pad>", "</s>", before="</s>", unknown="</s>"),
        {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"},
    ),
    "clip-text": Kind(
        "CLIPTextConfig",
        {**_BERT, "projection_dim": WIDTH, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1},
        lower_case_pairs,
        {"bos_token": "<|startoftext|>", "eos_token": _END, "unk_token": _END, "pad_token": _END},
    ),
    "t5": Kind(
        "T5Config",
        {"d_model": WIDTH, "num_layers": 2, "num_heads": 2, "d_kv": 8, "d_ff": 32},
        lambda: unigram("<pad>", "</s>", "<unk>", after="</s>"),
        {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
    ),
    "xlnet": Kind(
        "XLNetConfig",
        {"d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 32},
        lambda: unigram("<unk>", "<s>", "</s>", "<cls>", "<sep>", "<pad>", after="<sep> <cls>"),
        {
            "unk_token": "<unk>",
            "cls_token": "<cls>",
            "sep_token": "<sep>",
            "pad_token": "<pad>",
            "padding_side": "left",
        },
    ),
    "qwen3": Kind(
        "Qwen3Config",
        {**_BERT, "num_key_value_heads": 2, "head_dim": 8},
        lambda: byte_level(_END, after=_END),
        {"eos_token": _END, "pad_token": _END, "padding_side": "left"},
        "lasttoken",
    ),
    "llama": Kind(
        "LlamaConfig",
        {**_BERT, "num_key_value_heads": 2},
        lambda: byte_level("<s>", "</s>", before="<s>", after="</s>"),
        {"bos_token": "<s>", "eos_token": "</s>"},
        "lasttoken",
    ),
}


def save_bare(kind: str, folder: Path) -> Path:
    """Write a transformers folder, without anything of sentence-transformers."""
    import torch
    import transformers

    spec = KINDS[kind]
    tokenizer = spec.tokenizer()
    config = getattr(transformers, spec.config)(vocab_size=tokenizer.get_vocab_size(), **spec.sizes)
    torch.manual_seed(7)
    model = transformers.AutoModel.from_config(config)
    if kind == "t5":
        model = transformers.T5EncoderModel(config)
    for parameter in model.parameters():  # the usual start is so small that texts hardly differ
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(folder)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **spec.names)
    wrapped.save_pretrained(folder)
    return folder


def make_model(kind: str, folder: Path) -> Any:
    """A live SentenceTransformer on the CPU, whose transformer was read from `folder`."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    transformer = Transformer(str(save_bare(kind, folder)))
    pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode=KINDS[kind].pooling)
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")
