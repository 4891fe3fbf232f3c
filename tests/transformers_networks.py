"""Architectures of transformers with few layers, small widths and seeded random weights: what the torch route is tested on."""

from __future__ import annotations

from typing import Any

import torch
from tcompile.models.optional import require
from tcompile.models.perturb import perturb
from torch_networks import VOCABULARY, Network


def _sizes(**options: Any) -> dict[str, Any]:
    """The options that most configurations call the same."""
    usual = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": VOCABULARY}
    return {**usual, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options}


class _Plain(torch.nn.Module):
    """Tensors by position in, one field of the result out."""

    def __init__(self, model: torch.nn.Module, names: list[str], output: str, fixed: dict[str, Any]):
        super().__init__()
        self.model, self.names, self.output, self.fixed = model, names, output, fixed

    def _result(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.names, tensors, strict=True)), **self.fixed)[self.output]


class _Ids(_Plain):
    def forward(self, input_ids):
        return self._result(input_ids)


class _FixedIds(_Ids):
    """Of one length."""


class _Masked(_Plain):
    def forward(self, input_ids, attention_mask):
        return self._result(input_ids, attention_mask)


class _FixedMasked(_Masked):
    """Of one length."""


class _Sequences(_Plain):
    def forward(self, input_ids, attention_mask, decoder_input_ids):
        return self._result(input_ids, attention_mask, decoder_input_ids)


class _Heard(_Plain):
    def forward(self, input_features, decoder_input_ids):
        return self._result(input_features, decoder_input_ids)


class _Image(_Plain):
    def forward(self, pixel_values):
        return self._result(pixel_values)


class _AnyImage(_Image):
    """Of any size."""


class _Wave(_Plain):
    def forward(self, input_values):
        return self._result(input_values)


class _Pairs(_Plain):
    def forward(self, input_ids, pixel_values, attention_mask):
        return self._result(input_ids, pixel_values, attention_mask)


_FORMS: dict[type[_Plain], dict[str, tuple[int | str, ...]]] = {
    _Ids: {"input_ids": ("batch", "seq")},
    _FixedIds: {"input_ids": ("batch", 11)},
    _FixedMasked: {"input_ids": ("batch", 11), "attention_mask": ("batch", 11)},
    _Masked: {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq")},
    _Sequences: {"input_ids": ("batch", "seq"), "attention_mask": ("batch", "seq"), "decoder_input_ids": ("batch", "target")},
    _Heard: {"input_features": ("batch", 16, 60), "decoder_input_ids": ("batch", "target")},
    _Image: {"pixel_values": ("batch", 3, 64, 64)},
    _AnyImage: {"pixel_values": ("batch", 3, "height", "width")},
    _Wave: {"input_values": ("batch", 1600)},
    _Pairs: {"input_ids": ("texts", "seq"), "pixel_values": ("images", 3, 32, 32), "attention_mask": ("texts", "seq")},
}
_RANGES = {"batch": (1, 8), "texts": (1, 8), "images": (1, 8), "seq": (1, 48), "target": (1, 48), "height": (64, 256), "width": (64, 256)}
_RUNS = [
    {"batch": 2, "texts": 3, "images": 2, "seq": 11, "target": 5, "height": 64, "width": 96},
    {"batch": 1, "texts": 1, "images": 4, "seq": 1, "target": 2, "height": 131, "width": 64},
    {"batch": 3, "texts": 2, "images": 1, "seq": 37, "target": 1, "height": 79, "width": 160},
]


def _transformer(
    form: type[_Plain],
    config: str,
    model: str,
    output: str = "logits",
    fixed: dict[str, Any] | None = None,
    least: int = 1,
    step: int = 1,
    **options: Any,
) -> Network:
    def build() -> torch.nn.Module:
        transformers = require("transformers")
        torch.manual_seed(0)
        network = getattr(transformers, model)(getattr(transformers, config)(**options))
        with torch.no_grad():
            for key, parameter in network.named_parameters():
                if parameter.ndim == 2 and key.endswith("weight"):
                    parameter.mul_(5)  # their initial 0.02 is for widths of a thousand: attention would be uniform
        return perturb(form(network, list(_FORMS[form]), output, fixed or {})).eval()

    used = {dim for shape in _FORMS[form].values() for dim in shape if isinstance(dim, str)}
    steps = dict.fromkeys(("height", "width"), step)
    runs = [
        {name: max(size // steps.get(name, 1) * steps.get(name, 1), least if name == "seq" else 1) for name, size in run.items() if name in used}
        for run in _RUNS
    ]
    dims = {name: (least if name == "seq" else low, high, steps.get(name, 1)) for name, (low, high) in _RANGES.items() if name in used}
    return Network(build, _FORMS[form], dims, runs)


def _encoder(name: str, model: str = "Model", **options: Any) -> Network:
    return _transformer(_Masked, f"{name}Config", f"{name}{model}", "last_hidden_state", **_sizes(max_position_embeddings=64, **options))


def _decoder(name: str, form: type[_Plain] = _Ids, model: str = "ForCausalLM", **options: Any) -> Network:
    return _transformer(form, f"{name}Config", f"{name}{model}", fixed={"use_cache": False}, **_sizes(**options))


_SHARED_HEADS = {"num_key_value_heads": 2, "head_dim": 8}
_EXPERTS = {"num_key_value_heads": 2, "moe_intermediate_size": 16}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
_VISION = {"image_size": 64, "patch_size": 16, "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
_TOWERS = {
    "text_config": {**_sizes(max_position_embeddings=64), "projection_dim": 16},
    "vision_config": {**_VISION, "image_size": 32, "patch_size": 8, "projection_dim": 16},
}
_NO_CACHE = {"use_cache": False}
TRANSFORMERS = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "distilbert": _transformer(
        _Masked, "DistilBertConfig", "DistilBertModel", "last_hidden_state", dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=VOCABULARY
    ),
    "electra": _encoder("Electra", embedding_size=16),
    "albert": _encoder("Albert", embedding_size=16),
    "deberta": _encoder("Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], max_relative_positions=-1),
    "deberta_v2": _encoder("DebertaV2", relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=16, share_att_key=True),
    "mpnet": _encoder("MPNet"),
    "convbert": _encoder("ConvBert", embedding_size=32),
    "squeezebert": _encoder(
        "SqueezeBert", embedding_size=32, q_groups=2, k_groups=2, v_groups=2, post_attention_groups=1, intermediate_groups=2, output_groups=2
    ),
    "mobilebert": _encoder("MobileBert", least=3, embedding_size=16, intra_bottleneck_size=16, true_hidden_size=16),
    "fnet": _transformer(_Ids, "FNetConfig", "FNetModel", "last_hidden_state", **_sizes(max_position_embeddings=64)),
    "modernbert": _encoder("ModernBert", global_attn_every_n_layers=2, local_attention=8, cls_token_id=1, sep_token_id=2),
    "xlnet": _transformer(
        _FixedMasked, "XLNetConfig", "XLNetModel", "last_hidden_state", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=64
    ),
    "funnel": _transformer(
        _FixedMasked,
        "FunnelConfig",
        "FunnelModel",
        "last_hidden_state",
        vocab_size=VOCABULARY,
        d_model=32,
        block_sizes=[1, 1],
        n_head=4,
        d_head=8,
        d_inner=64,
    ),
    "gpt2": _transformer(
        _Ids, "GPT2Config", "GPT2LMHeadModel", fixed=_NO_CACHE, n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=64
    ),
    "gpt2_eager": _transformer(
        _Ids,
        "GPT2Config",
        "GPT2LMHeadModel",
        fixed=_NO_CACHE,
        n_layer=2,
        n_embd=32,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        attn_implementation="eager",
    ),
    "gpt2_masked": _transformer(
        _Masked, "GPT2Config", "GPT2LMHeadModel", fixed=_NO_CACHE, n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=64
    ),
    "gptj": _transformer(
        _Ids, "GPTJConfig", "GPTJForCausalLM", fixed=_NO_CACHE, n_layer=2, n_embd=32, n_head=4, rotary_dim=4, vocab_size=VOCABULARY, n_positions=64
    ),
    "gptneo": _transformer(
        _Ids,
        "GPTNeoConfig",
        "GPTNeoForCausalLM",
        fixed=_NO_CACHE,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    ),
    "gptneox": _decoder("GPTNeoX"),
    "gpt_bigcode": _transformer(
        _Ids, "GPTBigCodeConfig", "GPTBigCodeForCausalLM", fixed=_NO_CACHE, n_layer=2, n_embd=32, n_head=4, vocab_size=VOCABULARY, n_positions=64
    ),
    "codegen": _transformer(
        _Ids,
        "CodeGenConfig",
        "CodeGenForCausalLM",
        fixed=_NO_CACHE,
        n_layer=2,
        n_embd=32,
        n_head=4,
        rotary_dim=4,
        vocab_size=VOCABULARY,
        n_positions=64,
    ),
    "llama": _decoder("Llama", **_SHARED_HEADS),
    "llama_masked": _decoder("Llama", _Masked, **_SHARED_HEADS),
    "mistral": _decoder("Mistral", sliding_window=8, **_SHARED_HEADS),
    "qwen2": _decoder("Qwen2", num_key_value_heads=2),
    "qwen3": _decoder("Qwen3", **_SHARED_HEADS),
    "gemma": _decoder("Gemma", **_SHARED_HEADS),
    "gemma2": _decoder("Gemma2", sliding_window=8, query_pre_attn_scalar=8, **_SHARED_HEADS),
    "gemma3": _transformer(
        _Ids, "Gemma3TextConfig", "Gemma3ForCausalLM", fixed=_NO_CACHE, **_sizes(sliding_window=8, query_pre_attn_scalar=8, **_SHARED_HEADS)
    ),
    "phi": _decoder("Phi"),
    "phi3": _decoder("Phi3", num_key_value_heads=2),
    "opt": _transformer(
        _Masked,
        "OPTConfig",
        "OPTForCausalLM",
        fixed=_NO_CACHE,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    ),
    "bloom": _transformer(_Masked, "BloomConfig", "BloomForCausalLM", fixed=_NO_CACHE, hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY),
    "falcon": _decoder("Falcon", _Masked),
    "falcon_alibi": _decoder("Falcon", _Masked, alibi=True),
    "mpt": _transformer(
        _Masked,
        "MptConfig",
        "MptForCausalLM",
        fixed=_NO_CACHE,
        d_model=32,
        n_layers=2,
        n_heads=4,
        expansion_ratio=2,
        vocab_size=VOCABULARY,
        max_seq_len=64,
    ),
    "stablelm": _decoder("StableLm", num_key_value_heads=2),
    "starcoder2": _decoder("Starcoder2", num_key_value_heads=2),
    "olmo2": _decoder("Olmo2", num_key_value_heads=2),
    "cohere": _decoder("Cohere", num_key_value_heads=2),
    "granite": _decoder("Granite", num_key_value_heads=2),
    "glm": _decoder("Glm", **_SHARED_HEADS),
    "helium": _decoder("Helium", **_SHARED_HEADS),
    "nemotron": _decoder("Nemotron", num_key_value_heads=2),
    "smollm3": _decoder("SmolLM3", num_key_value_heads=2),
    "xglm": _transformer(
        _Ids,
        "XGLMConfig",
        "XGLMForCausalLM",
        fixed=_NO_CACHE,
        d_model=32,
        ffn_dim=64,
        num_layers=2,
        attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=64,
    ),
    "biogpt": _decoder("BioGpt", _Masked, max_position_embeddings=64),
    "mixtral": _decoder("Mixtral", num_local_experts=4, num_key_value_heads=2),
    "qwen2_moe": _decoder("Qwen2Moe", num_experts=4, num_experts_per_tok=2, shared_expert_intermediate_size=32, **_EXPERTS),
    "qwen3_moe": _decoder("Qwen3Moe", num_experts=4, num_experts_per_tok=2, head_dim=8, **_EXPERTS),
    "olmoe": _decoder("Olmoe", num_experts=4, num_experts_per_tok=2, num_key_value_heads=2),
    "deepseek_v2": _decoder(
        "DeepseekV2",
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        num_key_value_heads=4,
    ),
    "mamba": _transformer(
        _FixedIds, "MambaConfig", "MambaForCausalLM", fixed=_NO_CACHE, hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=VOCABULARY
    ),
    "mamba2": _transformer(
        _FixedIds,
        "Mamba2Config",
        "Mamba2ForCausalLM",
        fixed=_NO_CACHE,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=8,
        n_groups=2,
        chunk_size=8,
        vocab_size=VOCABULARY,
    ),
    "rwkv": _transformer(
        _FixedIds,
        "RwkvConfig",
        "RwkvForCausalLM",
        fixed=_NO_CACHE,
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        rescale_every=0,  # else the model divides its own weights when it is called
        vocab_size=VOCABULARY,
    ),
    "t5": _transformer(_Sequences, "T5Config", "T5ForConditionalGeneration", fixed=_NO_CACHE, **_T5),
    "bart": _transformer(_Sequences, "BartConfig", "BartForConditionalGeneration", fixed=_NO_CACHE, **_BART),
    "mbart": _transformer(_Sequences, "MBartConfig", "MBartForConditionalGeneration", fixed=_NO_CACHE, **_BART),
    "marian": _transformer(_Sequences, "MarianConfig", "MarianMTModel", fixed=_NO_CACHE, **_BART),
    "m2m100": _transformer(_Sequences, "M2M100Config", "M2M100ForConditionalGeneration", fixed=_NO_CACHE, **_BART),
    "whisper": _transformer(
        _Heard,
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        fixed=_NO_CACHE,
        **{key: value for key, value in _BART.items() if key != "max_position_embeddings"},
        num_mel_bins=16,
        max_source_positions=30,
        max_target_positions=64,
    ),
    "wav2vec2": _transformer(
        _Wave,
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        **_sizes(conv_dim=(16,) * 3, conv_stride=(5, 2, 2), conv_kernel=(10, 3, 2), num_conv_pos_embedding_groups=4, num_conv_pos_embeddings=8),
    ),
    "clip": _transformer(_Pairs, "CLIPConfig", "CLIPModel", "logits_per_image", projection_dim=16, **_TOWERS),
    "siglip": _transformer(_Pairs, "SiglipConfig", "SiglipModel", "logits_per_image", **_TOWERS),
    "vit_patches": _transformer(_Image, "ViTConfig", "ViTModel", "last_hidden_state", **_VISION),
    "dpt": _transformer(
        _Image,
        "DPTConfig",
        "DPTForSemanticSegmentation",  # depth ends in a ReLU that is zero everywhere on random weights
        "logits",
        **{**_VISION, "num_hidden_layers": 4},
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 16, 24, 32],
        fusion_hidden_size=16,
        initializer_range=0.1,  # the default of 0.02 leaves nothing of the image at the end
    ),
    "dinov2": _transformer(_Image, "Dinov2Config", "Dinov2Model", "last_hidden_state", **_VISION),
    "vit_any_size": _transformer(_AnyImage, "ViTConfig", "ViTModel", "last_hidden_state", fixed={"interpolate_pos_encoding": True}, **_VISION),
    "swin_any_size": _transformer(
        _AnyImage,
        "SwinConfig",
        "SwinModel",
        "last_hidden_state",
        step=32,
        image_size=64,
        patch_size=4,
        embed_dim=24,
        depths=[2, 1],
        num_heads=[2, 4],
        window_size=4,
    ),
    "segformer": _transformer(
        _AnyImage, "SegformerConfig", "SegformerForSemanticSegmentation", depths=[1, 1, 1, 1], hidden_sizes=[8, 16, 24, 32], decoder_hidden_size=32
    ),
}
#: what the import refuses, and the reason that it gives
REFUSED = {"fnet": "_fft_c2c", "falcon_alibi": "bfloat16", "deepseek_v2": "complex64"}
#: what is refused with open dims only
REFUSED_OPEN = {"deberta": "depends on the data"}
