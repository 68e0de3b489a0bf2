"""Tiny random models of many architectures, and a tokenizer to go with them.

Nothing here is downloaded: every model is built from a config of a few
thousand parameters, in fp32 and in eval mode, and is the same for the same seed.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCAB_SIZE = 300
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
CONTEXT_LENGTH = 512

_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)

# 41 merges, each a known token plus one symbol, in the order in which they apply.
# "Ġ" is how byte-level BPE writes a space.
_MERGES = [
    "th", "the", "in", "ing", "er", "on", "an", "re", "en", "at", "or", "es", "is", "it",
    "ou", "st", "ed", "al", "ar", "te", "nd", "to", "nt", "se", "Ġa", "Ġs", "Ġo", "Ġw",
    "Ġb", "Ġc", "Ġm", "Ġf", "Ġp", "Ġd", "Ġt", "Ġth", "Ġthe", "Ġh", "Ġl", "Ġn", "Ġi",
]  # fmt: skip

# The same for a vocabulary as SentencePiece writes it, where "▁" is a space.
_PIECES = ["▁t", "▁a", "▁th", "▁the", "▁is", "in", "er", "▁P", "ar", "is", "▁Par", "▁Paris"]
_PIECE_MERGES = [
    ("▁", "t"), ("▁", "a"), ("▁t", "h"), ("▁th", "e"), ("i", "s"), ("▁", "is"), ("i", "n"),
    ("e", "r"), ("▁", "P"), ("a", "r"), ("▁P", "ar"), ("▁Par", "is"),
]  # fmt: skip

# Few layers, grouped-query attention (two query heads for each KV head), an MLP
# whose width differs from every other size so that swapped shapes show.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_HEAD_DIM = {"head_dim": 16}
_GPT2 = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": CONTEXT_LENGTH,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
    "pad_token_id": PAD_ID,
}
_OPT = {
    **{k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")},
    "ffn_dim": 96,
    "word_embed_proj_dim": 64,
}
_GEMMA = {**_COMMON, **_HEAD_DIM, "sliding_window": 32, "query_pre_attn_scalar": 16}
# Gemma scales its embeddings up; with a tied head it would only ever repeat its input.
_GEMMA["tie_word_embeddings"] = False
_GPT_NEOX = {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"}
# Factors that larger Granites have; at their defaults of 1 they would go untested.
_GRANITE = {
    **_COMMON,
    "embedding_multiplier": 2.0,
    "attention_multiplier": 0.2,
    "residual_multiplier": 0.5,
    "logits_scaling": 2.0,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, seed: int
) -> PreTrainedModel:
    # The fork keeps the caller's random stream as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = model_class(config)
        for name, parameter in model.named_parameters():
            # Logits of freshly initialised models are nearly flat; a wider spread
            # makes greedy choices differ from position to position.
            if parameter.ndim > 1 and "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.15)
    model.train(False)
    model.requires_grad_(False)
    return model


def _builder(
    model_class: type[PreTrainedModel],
    config_class: type[PreTrainedConfig],
    defaults: Mapping[str, Any],
) -> Callable[..., PreTrainedModel]:
    def build(seed: int = 0, **overrides: Any) -> PreTrainedModel:
        return _build(model_class, config_class(**{**defaults, **overrides}), seed)

    return build


TINY_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _builder(LlamaForCausalLM, LlamaConfig, _COMMON),
    "qwen2": _builder(Qwen2ForCausalLM, Qwen2Config, _COMMON),
    "qwen3": _builder(Qwen3ForCausalLM, Qwen3Config, {**_COMMON, **_HEAD_DIM}),
    "mistral": _builder(MistralForCausalLM, MistralConfig, {**_COMMON, "sliding_window": 32}),
    "gemma2": _builder(Gemma2ForCausalLM, Gemma2Config, _GEMMA),
    "gemma3_text": _builder(
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi3": _builder(Phi3ForCausalLM, Phi3Config, _COMMON),
    "gpt2": _builder(GPT2LMHeadModel, GPT2Config, _GPT2),
    "gpt_neox": _builder(GPTNeoXForCausalLM, GPTNeoXConfig, _GPT_NEOX),
    "opt": _builder(OPTForCausalLM, OPTConfig, _OPT),
    "olmo2": _builder(Olmo2ForCausalLM, Olmo2Config, _COMMON),
    "granite": _builder(GraniteForCausalLM, GraniteConfig, _GRANITE),
}
"""Builders `(seed=0, **config_overrides) -> model`, by `model_type`.

All go through transformers' attention interface. GPT-2's projections are
`Conv1D` modules; the others use `nn.Linear`.
"""

TINY_MOE_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "qwen3_moe": _builder(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        {**_COMMON, **_HEAD_DIM, **_EXPERTS, "moe_intermediate_size": 48},
    ),
    "mixtral": _builder(MixtralForCausalLM, MixtralConfig, {**_COMMON, **_EXPERTS}),
}
"""The same for mixtures of experts, whose experts are parameters and no layers.

PEFT reads "all-linear" as these parameters too.
"""


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """A Llama of two layers, hidden size 64, four query and two KV heads."""
    model = TINY_MODELS["llama"](seed, **overrides)
    assert isinstance(model, LlamaForCausalLM)
    return model


def tiny_phi(seed: int = 0) -> PhiForCausalLM:
    """A Phi, whose output head has a bias, which is not zero."""
    config = PhiConfig(**{k: v for k, v in _COMMON.items() if k != "num_key_value_heads"})
    model = _build(PhiForCausalLM, config, seed)
    assert isinstance(model, PhiForCausalLM)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.linspace(-1, 1, VOCAB_SIZE))
    return model


def tiny_falcon(seed: int = 0) -> FalconForCausalLM:
    """A Falcon, whose attention does not go through transformers' attention interface."""
    config = FalconConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = _build(FalconForCausalLM, config, seed)
    assert isinstance(model, FalconForCausalLM)
    return model


def tiny_bloom(seed: int = 0) -> BloomForCausalLM:
    """A BLOOM, whose attention does not go through it either."""
    config = BloomConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=64,
        n_layer=2,
        n_head=4,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
    )
    model = _build(BloomForCausalLM, config, seed)
    assert isinstance(model, BloomForCausalLM)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can encode any text and decode any id of a tiny model.

    Three special tokens, the 256 bytes and `_MERGES`, so that some tokens span
    several characters and some characters several tokens.
    """
    vocab = {token: i for i, token in enumerate([BOS, EOS, PAD])}
    for symbol in sorted(ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges = [(pair[:-1], pair[-1]) for pair in _MERGES]
    for pair in _MERGES:
        vocab[pair] = len(vocab)
    assert len(vocab) == VOCAB_SIZE
    backend = Tokenizer(BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer made as Llama 2's: pieces behind "▁", bytes for what has no piece.

    Three special tokens, the 256 bytes, a space, the letters and `_PIECES`. Its decoder drops
    the space that begins a text.
    """
    symbols = [f"<0x{byte:02X}>" for byte in range(256)]
    symbols += ["▁", "P", *map(chr, range(ord("a"), ord("z") + 1)), *_PIECES]
    vocab = {token: i for i, token in enumerate([BOS, EOS, PAD, *symbols])}
    assert len(vocab) <= VOCAB_SIZE
    backend = Tokenizer(BPE(vocab=vocab, merges=_PIECE_MERGES, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def save_tiny_base(
    directory: Path,
    *,
    seed: int = 0,
    family: str = "llama",
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a tiny model and a tokenizer to `directory` in the Hugging Face format."""
    TINY_MODELS[family](seed).save_pretrained(directory)
    (tokenizer or tiny_tokenizer()).save_pretrained(directory)
    return directory
