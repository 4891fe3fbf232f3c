"""The method of passes/token_pruning in plain PyTorch: forwards of a ViT and of BERT, spelled out, whose tokens leave between attention and MLP of given blocks."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch.nn import functional


def kept(tokens: int, keep: float) -> int:
    ratio = Fraction(str(keep))
    return -(-tokens * ratio.numerator // ratio.denominator)


def default_blocks(depth: int) -> set[int]:
    return {depth // 4, depth // 2, 3 * depth // 4}


def attend(q, k, v, bias):
    """q, k, v: [B, H, N, D], bias: added to the scores -> (result [B, H, N, D], attention received by each token [B, N])."""
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias).softmax(-1)
    return weights @ v, weights.mean((1, 2))


def drop(x, received, keep):
    """x: [B, N, C] -> ([B, K, C], indices [B, K]): token 0 and those that receive the most attention."""
    count = kept(x.shape[1], keep)
    score = received.clone()
    score[:, 0] = float("inf")
    indices = score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values  # equal scores: the earlier one
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[2])), indices


def merge(x, keys, size, keep):
    """x: [B, N, C], keys: [B, H, N, D], size: [B, N], 0 for tokens that a mask hides -> the same of K tokens, and their indices. One row at a time, after the paper."""
    rows, sizes, places = [], [], []
    tokens = x.shape[1]
    count = max(kept(tokens, keep), tokens // 2 + 1)
    for row, key, weight in zip(x, functional.normalize(keys.mean(1), dim=-1), size, strict=True):
        even, odd = torch.arange(2, tokens, 2), torch.arange(1, tokens, 2)
        scores = key[even] @ key[odd].T
        scores[:, weight[odd] == 0] = -3
        scores[weight[even] == 0] = 2
        best, partner = scores.max(1)
        leaving = best.flip(0).sort(descending=True, stable=True).indices[: tokens - count]
        leaving = len(even) - 1 - leaving
        total, sums = weight.clone(), row * weight[:, None]
        stays = torch.ones(tokens, dtype=torch.bool)
        for index in leaving.tolist():
            source, target = int(even[index]), int(odd[partner[index]])
            stays[source] = False
            if weight[source] > 0:
                total[target] += weight[source]
                sums[target] += row[source] * weight[source]
        rows.append(sums[stays] / total[stays].clamp(min=1e-30)[:, None])
        sizes.append(total[stays])
        places.append(stays.nonzero()[:, 0])
    return torch.stack(rows), torch.stack(sizes), torch.stack(places)


class Leaving:
    """What a forward does after the attention of every block. bias: what it adds to the scores of the next one."""

    def __init__(self, depth: int, keep: float, method: str, mask=None, blocks: tuple[int, ...] = ()):
        self.blocks, self.keep, self.method, self.mask = set(blocks) or default_blocks(depth), keep, method, mask
        self.size = None if mask is None else mask.float()
        self.block = -1
        self.indices: list[torch.Tensor] = []

    @property
    def bias(self):
        """[B, 1, 1, N] or 0."""
        bias: Any = 0
        if self.mask is not None:
            bias = torch.where(self.mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        if self.method == "merge" and self.indices:
            bias = bias + self.size.clamp(min=1e-30).log()[:, None, None]
        return bias

    def __call__(self, x, received, keys):
        self.block += 1
        if self.block not in self.blocks:
            return x
        if self.method == "drop":
            x, indices = drop(x, received, self.keep)
        else:
            size = torch.ones(x.shape[:2]) if self.size is None else self.size
            x, self.size, indices = merge(x, keys, size, self.keep)
        if self.mask is not None:
            self.mask = self.mask.gather(1, indices)
        self.indices.append(indices)
        return x


def _heads(x, count: int):
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def mnist_vit(model: Any, x, keep: float, method: str = "drop", blocks: tuple[int, ...] = ()):
    """Logits of `models.mnist.mnist_vit`."""
    patches = model.stem(x).flatten(2).transpose(1, 2) + model.positions[:, 1:]
    x = torch.cat([(model.cls + model.positions[:, :1]).expand(len(x), -1, -1), patches], 1)
    leaving = Leaving(len(model.blocks), keep, method, blocks=blocks)
    for block in model.blocks:
        q, k, v = (_heads(part, 4) for part in block.qkv(block.norm1(x)).chunk(3, -1))
        seen, received = attend(q, k, v, leaving.bias)
        x = leaving(x + block.proj(seen.transpose(1, 2).flatten(2)), received, k)
        x = x + block.down(functional.gelu(block.up(block.norm2(x))))
    return model.head(model.norm(x)[:, 0])


def timm_vit(model: Any, x, keep: float, method: str = "drop", blocks: tuple[int, ...] = ()):
    """Logits of a timm VisionTransformer."""
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    leaving = Leaving(len(model.blocks), keep, method, blocks=blocks)
    for block in model.blocks:
        q, k, v = (_heads(part, block.attn.num_heads) for part in block.attn.qkv(block.norm1(x)).chunk(3, -1))
        seen, received = attend(q, k, v, leaving.bias)
        x = leaving(x + block.attn.proj(seen.transpose(1, 2).flatten(2)), received, k)
        x = x + block.mlp(block.norm2(x))
    return model.forward_head(model.norm(x))


def bert(model: Any, input_ids, attention_mask, keep: float, method: str = "drop", blocks: tuple[int, ...] = ()):
    """(last hidden states, mask of their tokens) of a transformers BertModel."""
    x = model.embeddings(input_ids)
    layers = model.encoder.layer
    leaving = Leaving(len(layers), keep, method, attention_mask, blocks)
    for layer in layers:
        own = layer.attention.self
        q, k, v = (_heads(part(x), own.num_attention_heads) for part in (own.query, own.key, own.value))
        seen, received = attend(q, k, v, leaving.bias)
        output = layer.attention.output
        x = output.LayerNorm(leaving(x + output.dense(seen.transpose(1, 2).flatten(2)), received, k))
        x = layer.output(layer.intermediate(x), x)
    return x, leaving.mask
