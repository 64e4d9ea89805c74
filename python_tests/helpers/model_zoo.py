"""Small random models and tokenizers for the tests: seconds to make, no network."""

from __future__ import annotations

import torch

TEXTS = [
    "The Eiffel Tower is located in the city of Paris, and the Louvre is a museum in Paris.",
    "Rome is the capital of Italy; the Colosseum is located in the city of Rome.",
    "Zürich lies in Switzerland, 東京 lies in Japan, and São Paulo lies in Brazil.",
    "Therefore I think that you know where the towers are, because the maps show them.",
    "A word may be cut into pieces: unbelievable, international, characterisation, location.",
] * 4

FAMILIES = ("llama", "gpt2", "qwen3", "gpt_neox", "phi3", "opt")


def byte_level_tokenizer(vocabulary: int = 400):
    """GPT-2's kind: bytes, so that one character may take several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    # Without the characters that are tested as unseen, so that they stay several bytes long.
    tokenizer.train_from_iterator([text for text in TEXTS if "東" not in text], trainer)
    return _fast(tokenizer, eos_token="<|end|>")


def metaspace_tokenizer(vocabulary: int = 400):
    """Llama's and sentencepiece's kind: `▁` for spaces, a beginning-of-text token before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _fast(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece_tokenizer():
    """BERT's kind: lower case, accents stripped, `##` pieces, a special token on either side."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    # Cut by hand: the library's trainer breaks ties by the order of a hash table, another in every process.
    pieces = set()
    for text in TEXTS:
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)):
            pieces.update([*word, *("##" + letter for letter in word), word[:4]])
            pieces.update("##" + word[i : i + 3] for i in range(4, len(word), 3))
    special = ["[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {piece: i for i, piece in enumerate([*special, *sorted(pieces)])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return _fast(tokenizer, bos_token="[CLS]", eos_token="[SEP]", unk_token="[UNK]")


def slow_tokenizer():
    """A tokenizer in pure Python, without offsets: words and spaces cut into pieces of two characters."""
    from transformers import PreTrainedTokenizer

    class SlowTokenizer(PreTrainedTokenizer):
        def __init__(self, **kwargs):
            characters = sorted({character for text in TEXTS for character in text})
            pieces = [
                "<s>",
                "<unk>",
                *characters,
                *(a + b for a in characters for b in characters if a.isalpha()),
            ]
            self.pieces = {piece: i for i, piece in enumerate(pieces)}
            self.names = pieces
            super().__init__(bos_token="<s>", unk_token="<unk>", **kwargs)

        @property
        def vocab_size(self):
            return len(self.pieces)

        def get_vocab(self):
            return dict(self.pieces)

        def _tokenize(self, text, **_kwargs):
            pieces, i = [], 0
            while i < len(text):
                size = 2 if text[i : i + 2] in self.pieces and i + 1 < len(text) else 1
                pieces.append(text[i : i + size])
                i += size
            return pieces

        def _convert_token_to_id(self, token):
            return self.pieces.get(token, 1)

        def _convert_id_to_token(self, index):
            return self.names[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return [0, *token_ids_0]

    return SlowTokenizer()


TOKENIZERS = {
    "byte-level": byte_level_tokenizer,
    "metaspace": metaspace_tokenizer,
    "word-piece": word_piece_tokenizer,
    "slow": slow_tokenizer,
}


def small_model(
    family: str = "llama",
    vocabulary: int = 400,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = 4,
):
    """A random causal language model of a few layers, hidden size 32, intermediate size 64."""
    import transformers as hf

    common = {"vocab_size": vocabulary, "max_position_embeddings": 128}
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        **common,
    }
    ids = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 0}
    grouped = {"num_key_value_heads": 2}
    falcon = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    configurations = {
        "llama": lambda: hf.LlamaConfig(**llama, **grouped, **ids),
        "qwen3": lambda: hf.Qwen3Config(**llama, **grouped, **ids, head_dim=16),
        "phi3": lambda: hf.Phi3Config(**llama, **grouped, **ids),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**llama, **ids),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=vocabulary, n_positions=128, n_embd=32, n_layer=4, n_head=4, n_inner=64, **ids
        ),
        "opt": lambda: hf.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            **common,
            **ids,
        ),
        "granite": lambda: hf.GraniteConfig(**llama, **grouped, **ids, logits_scaling=3.0),
        "bloom": lambda: hf.BloomConfig(vocab_size=vocabulary, hidden_size=32, n_layer=4, n_head=4, **ids),
        "falcon": lambda: hf.FalconConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            alibi=True,
            **ids,
        ),
        "gptj": lambda: hf.GPTJConfig(
            vocab_size=vocabulary,
            n_positions=128,
            n_embd=32,
            n_layer=4,
            n_head=4,
            rotary_dim=4,
            n_inner=64,
            **ids,
        ),
        # A window shorter than the texts.
        "gemma2": lambda: hf.Gemma2Config(
            **llama, **grouped, **ids, head_dim=8, sliding_window=8, final_logit_softcapping=5.0
        ),
        "gemma": lambda: hf.GemmaConfig(**llama, **grouped, **ids, head_dim=8),
        "gemma3": lambda: hf.Gemma3TextConfig(**llama, **grouped, **ids, head_dim=8, sliding_window=8),
        "mistral": lambda: hf.MistralConfig(**llama, **grouped, **ids, sliding_window=8),
        "qwen2": lambda: hf.Qwen2Config(**llama, **grouped, **ids),
        "phi": lambda: hf.PhiConfig(**llama, **ids),
        "olmo2": lambda: hf.Olmo2Config(**llama, **grouped, **ids),
        "stablelm": lambda: hf.StableLmConfig(**llama, **grouped, **ids),
        # With one head of keys and values, attention beside the MLP.
        "falcon_7b": lambda: hf.FalconConfig(**falcon, **ids, multi_query=True, parallel_attn=True),
        "falcon_40b": lambda: hf.FalconConfig(**falcon, **ids, new_decoder_architecture=True, num_kv_heads=2),
        "mixtral": lambda: hf.MixtralConfig(**llama, **grouped, **ids, num_local_experts=2),
        "qwen2_moe": lambda: hf.Qwen2MoeConfig(
            **llama, **grouped, **ids, **experts, shared_expert_intermediate_size=48
        ),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(**llama, **grouped, **ids, **experts, head_dim=16),
    }
    state = torch.random.get_rng_state()
    try:
        torch.manual_seed(seed)
        model = hf.AutoModelForCausalLM.from_config(configurations[family]())
        # The usual initial 0.02 leaves so small a model without any opinion to edit.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.mul_(5)
    finally:
        torch.random.set_rng_state(state)
    return model.to(dtype).eval()


def small_encoder(hidden: int = 32, seed: int = 0):
    """A random encoder of two layers for the word pieces of `word_piece_tokenizer`."""
    import transformers

    config = transformers.BertConfig(
        vocab_size=300,
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertModel(config).eval()


def _fast(tokenizer, **special):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
