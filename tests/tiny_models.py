"""Random models of a few thousand weights, saved like real ones: every test loads them the way a learner would."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CORPUS = ["When Mary and John went to the store, John gave a drink to Mary.", "The café's crème brûlée: naïve, 100 %!"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, **GROUPED),
    "mistral": lambda vocab: MistralConfig(vocab_size=vocab, sliding_window=4, **GROUPED),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, **GROUPED),
    "qwen3": lambda vocab: Qwen3Config(vocab_size=vocab, head_dim=16, **GROUPED),
    "gpt2": lambda vocab: GPT2Config(vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=64),
    "bert": lambda vocab: BertConfig(vocab_size=vocab, max_position_embeddings=64, **SIZES),
    "masked": lambda vocab: BertConfig(vocab_size=vocab, max_position_embeddings=64, **SIZES),
}
ENCODERS = {"bert": BertModel, "masked": BertForMaskedLM}
DECODERS = [name for name in CONFIGS if name not in ENCODERS]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Like GPT-2's: every byte is a token, and a few merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Like BERT's: ## continues a word, [CLS] and [SEP] around the text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """Like Llama 2's: ▁ for a space, and <0xF0> for the bytes of what is not in the vocabulary."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: index for index, piece in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def save(folder: Path, kind: str, seed: int = 0, tokenizer: PreTrainedTokenizerFast | None = None) -> Path:
    """Write a random model of `kind`, a key of `CONFIGS`, to `folder`.

    Its weights are larger than a fresh model's, so that attention is far from uniform.
    """
    if tokenizer is None:
        tokenizer = word_piece_tokenizer() if kind in ENCODERS else byte_level_tokenizer()
    config = CONFIGS[kind](len(tokenizer))
    torch.manual_seed(seed)
    model = ENCODERS[kind](config) if kind in ENCODERS else AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
