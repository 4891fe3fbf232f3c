"""All graph passes by name. A new pass is one line here."""

from __future__ import annotations

from .attention.cache import CachedKeys
from .attention.fuse import FuseAttention
from .attention.prefix import SharedPrefix
from .attention.quantized import QuantizedAttention
from .attention.scores import Int8Scores
from .base import Pass
from .canonicalize import Canonicalize
from .convolutions import Convolutions
from .layout import ChannelsLast
from .normalization import RecognizeNormalizations
from .precision import Precision
from .quantization.qdq import RecognizeQdq
from .quantization.quantize import Quantize
from .sparsity.sparsify import Sparsify
from .token_pruning.prune import TokenPruning

PASSES: dict[str, type[Pass]] = {
    cls.name: cls
    for cls in (
        Canonicalize,
        Convolutions,
        RecognizeQdq,
        RecognizeNormalizations,
        FuseAttention,
        QuantizedAttention,
        SharedPrefix,
        CachedKeys,
        TokenPruning,
        Sparsify,
        Quantize,
        Int8Scores,
        Precision,
        ChannelsLast,
    )
}
