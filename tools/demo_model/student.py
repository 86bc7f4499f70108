"""A Qwen3 body for training: no padding mask, and every step the same number of tokens.

The parameters have the names of transformers' `Qwen3Model`, so a state dict fits both. Texts are
padded on the right; under a causal mask a text never attends to the padding behind it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

HEAD = 64
THETA = 1_000_000
EPS = 1e-6


class Norm(nn.Module):
    """Root mean square normalisation."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised rows in their type."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return (wide * self.weight).to(x.dtype)


class Attention(nn.Module):
    """The projections of one layer's attention."""

    def __init__(self, size: int) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(size, size, bias=False))
        self.q_norm, self.k_norm = Norm(HEAD), Norm(HEAD)


class Feed(nn.Module):
    """The gated feed-forward part of one layer."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the part's output."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to heads, shape (tokens, heads, HEAD)."""
    left, right = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-right, left], -1) * sin[:, None]


class Layer(nn.Module):
    """One layer, in two parts around the attention itself; rows are tokens of all texts."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.self_attn = Attention(size)
        self.mlp = Feed(size, inner)
        self.input_layernorm, self.post_attention_layernorm = Norm(size), Norm(size)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, shape (tokens, heads, HEAD)."""
        own, x = self.self_attn, self.input_layernorm(x)
        q, k, v = (p(x).unflatten(-1, (-1, HEAD)) for p in (own.q_proj, own.k_proj, own.v_proj))
        return rotated(own.q_norm(q), cos, sin), rotated(own.k_norm(k), cos, sin), v

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's output and the feed-forward part."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Student(nn.Module):
    """Token ids to the unit vector at each text's last token."""

    def __init__(self, vocabulary: int, size: int, layers: int, inner: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, size)
        self.layers = nn.ModuleList(Layer(size, inner) for _ in range(layers))
        self.norm = Norm(size)
        self.before, self.after = Layer.before, Layer.after
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def compile(self) -> None:
        """Compile the parts around the attention; their shapes never change."""
        self.before = torch.compile(Layer.before, dynamic=False)
        self.after = torch.compile(Layer.after, dynamic=False)

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        """Return unit vectors in float32, shape (texts, size); `last` is the last token's place."""
        count, length = ids.shape
        x = self.embed_tokens(ids.reshape(-1)).to(self.kind(ids))
        spots = torch.arange(length, device=ids.device, dtype=torch.float32)
        steps = THETA ** -(torch.arange(0, HEAD, 2, device=ids.device) / HEAD)
        angles = (spots[:, None] * steps).repeat(count, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            heads = (
                t.unflatten(0, (count, length)).transpose(1, 2)
                for t in self.before(layer, x, cos, sin)
            )
            attended = F.scaled_dot_product_attention(*heads, is_causal=True)
            x = self.after(layer, x, attended.transpose(1, 2).reshape(count * length, -1))
        found = x.unflatten(0, (count, length))[torch.arange(count, device=ids.device), last]
        return F.normalize(self.norm(found.float()), dim=-1)

    def kind(self, ids: Tensor) -> torch.dtype:
        """Return the type of the hidden states: that of autocast, if it is on."""
        device = ids.device.type
        return (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        )
