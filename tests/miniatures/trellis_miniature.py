"""TRELLIS, TRELLIS.2 and Hi3DGen in small: modules, samplers, pipelines and checkpoints with the published names, shapes and order of calls, on plain torch.

Written from the published interfaces (microsoft/TRELLIS, microsoft/TRELLIS.2, Stable-X/Hi3DGen; MIT); no spconv, no flash-attn. Norms are computed in float32 or better, so that float64 stays exact.
`write_trellis(folder)` and `write_trellis2(folder)` put a checkpoint on disk (pipeline.json, ckpts/NAME.json, ckpts/NAME.safetensors); `as_package(name)` lets the names `trellis` and `trellis2` be imported.
"""

import json
import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from papers10.core.random import generator


class SparseTensor:
    """feats [T, …] at coords int32 [T, 4] (batch first), rows of one sample side by side; `layout` has one slice a sample."""

    def __init__(self, feats, coords, shape=None, layout=None, *, scale=(1, 1, 1), spatial_cache=None):
        count = int(coords[:, 0].max()) + 1 if shape is None else shape[0]
        self.feats, self.coords, self.shape = feats, coords, torch.Size([count, *feats.shape[1:]])
        ends = torch.bincount(coords[:, 0].long(), minlength=count).cumsum(0).tolist()
        self.layout = layout or [slice(start, end) for start, end in zip([0, *ends[:-1]], ends)]
        self._scale, self._spatial_cache = scale, {} if spatial_cache is None else spatial_cache

    @property
    def dtype(self):
        return self.feats.dtype

    @property
    def device(self):
        return self.feats.device

    @property
    def ndim(self):
        return len(self.shape)

    def replace(self, feats, coords=None):
        coords = self.coords if coords is None else coords
        return type(self)(feats, coords, self.shape, self.layout, scale=self._scale, spatial_cache=self._spatial_cache)

    def reshape(self, *shape):
        return self.replace(self.feats.reshape(len(self.feats), *shape))

    def unbind(self, dim):
        return [self.replace(part) for part in self.feats.unbind(dim)]

    def type(self, dtype):
        return self.replace(self.feats.type(dtype))

    def float(self):
        return self.type(torch.float32)

    def to(self, *args, **kwargs):
        feats = self.feats.to(*args, **kwargs)
        return self.replace(feats, self.coords.to(feats.device))

    def std(self, dim, keepdim=True):
        rows = [self.feats[part].double() for part in self.layout]
        return torch.stack([((row**2).mean() - row.mean() ** 2).clamp(min=0).sqrt() for row in rows])[:, None].to(
            self.dtype
        )

    def register_spatial_cache(self, key, value):
        self._spatial_cache.setdefault(str(self._scale), {})[key] = value

    def get_spatial_cache(self, key):
        return self._spatial_cache.get(str(self._scale), {}).get(key)

    def __getitem__(self, index):
        coords = self.coords[self.layout[index]].clone()
        coords[:, 0] = 0
        return type(self)(self.feats[self.layout[index]], coords)

    def _with(self, other, operation):
        if isinstance(other, SparseTensor):
            other = other.feats
        elif isinstance(other, Tensor) and other.ndim == 2 and len(other) == self.shape[0]:
            other = other[self.coords[:, 0].long()]
        return self.replace(operation(self.feats, other))

    def __add__(self, other):
        return self._with(other, torch.add)

    def __sub__(self, other):
        return self._with(other, torch.sub)

    def __mul__(self, other):
        return self._with(other, torch.mul)

    def __truediv__(self, other):
        return self._with(other, torch.div)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return self._with(other, lambda mine, theirs: theirs - mine)


def _wide(x):
    return x if x.dtype == torch.float64 else x.float()


class LayerNorm32(nn.LayerNorm):
    def forward(self, x):
        weight, bias = (None if p is None else p.to(_wide(x).dtype) for p in (self.weight, self.bias))
        return F.layer_norm(_wide(x), self.normalized_shape, weight, bias, self.eps).type(x.dtype)


class MultiHeadRMSNorm(nn.Module):
    """gamma [heads, head width]; of queries or keys [..., heads, head width], as Tensor or SparseTensor."""

    def __init__(self, dim, heads):
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.ones(heads, dim))

    def forward(self, x):
        values = x.feats if isinstance(x, SparseTensor) else x
        out = (F.normalize(_wide(values), dim=-1) * self.gamma.to(_wide(values).dtype) * self.scale).to(values.dtype)
        return x.replace(out) if isinstance(x, SparseTensor) else out


SparseMultiHeadRMSNorm = MultiHeadRMSNorm


def sdpa(q, k, v):
    """Softmax attention of [B, L, heads, width]."""
    return F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


class RotaryPositionEmbedder(nn.Module):
    """Complex phases [..., width / 2] of whole-numbered places [..., 3]; features that no axis gets are not turned."""

    def __init__(self, head_dim, dim=3, rope_freq=(1.0, 10000.0)):
        super().__init__()
        self.head_dim, self.dim, self.rope_freq = head_dim, dim, rope_freq
        count = head_dim // 2 // dim
        self.freqs = rope_freq[0] / rope_freq[1] ** (torch.arange(count, dtype=torch.float32) / count)

    def phases(self, places):
        angles = (places[..., None].float() * self.freqs.to(places.device)).flatten(-2)
        angles = F.pad(angles, (0, self.head_dim // 2 - angles.shape[-1]))
        return torch.polar(torch.ones_like(angles), angles)

    def forward(self, places):
        return self.phases(places)

    @staticmethod
    def apply_rotary_embedding(x, phases):
        wide = _wide(x)
        turned = torch.view_as_complex(wide.reshape(*wide.shape[:-1], -1, 2).contiguous()) * phases.unsqueeze(-2).to(
            torch.complex128 if wide.dtype == torch.float64 else torch.complex64
        )
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)


class SparseRotaryPositionEmbedder(RotaryPositionEmbedder):
    def forward(self, q, k=None):
        phases = self.phases(q.coords[:, 1:])
        turned = [None if x is None else x.replace(self.apply_rotary_embedding(x.feats, phases)) for x in (q, k)]
        return turned[0] if k is None else tuple(turned)


class _Attention(nn.Module):
    norm = MultiHeadRMSNorm

    def __init__(
        self,
        channels,
        num_heads,
        ctx_channels=None,
        type="self",
        attn_mode="full",
        qkv_bias=True,
        use_rope=False,
        rope_freq=(1.0, 10000.0),
        qk_rms_norm=False,
    ):
        super().__init__()
        self.channels, self.num_heads, self.head_dim, self._type, self.attn_mode = (
            channels,
            num_heads,
            channels // num_heads,
            type,
            attn_mode,
        )
        self.ctx_channels, self.use_rope, self.qk_rms_norm = ctx_channels or channels, use_rope, qk_rms_norm
        if type == "self":
            self.to_qkv = nn.Linear(channels, 3 * channels, bias=qkv_bias)
        else:
            self.to_q, self.to_kv = (
                nn.Linear(channels, channels, bias=qkv_bias),
                nn.Linear(self.ctx_channels, 2 * channels, bias=qkv_bias),
            )
        if qk_rms_norm:
            self.q_rms_norm, self.k_rms_norm = (self.norm(self.head_dim, num_heads) for _ in range(2))
        self.to_out = nn.Linear(channels, channels)

    def _normed(self, q, k):
        return (self.q_rms_norm(q), self.k_rms_norm(k)) if self.qk_rms_norm else (q, k)


class MultiHeadAttention(_Attention):
    """Of dense tokens [B, L, C]. The second generation gets its rotations as `phases`."""

    def forward(self, x, context=None, phases=None):
        heads = (self.num_heads, self.head_dim)
        if self._type == "self":
            q, k, v = self.to_qkv(x).unflatten(-1, (3, *heads)).unbind(2)
        else:
            q, (k, v) = self.to_q(x).unflatten(-1, heads), self.to_kv(context).unflatten(-1, (2, *heads)).unbind(2)
        q, k = self._normed(q, k)
        if self.use_rope:
            q, k = (RotaryPositionEmbedder.apply_rotary_embedding(part, phases) for part in (q, k))
        return self.to_out(sdpa(q, k, v).flatten(2))


class SparseMultiHeadAttention(_Attention):
    """Of a SparseTensor to itself, or to dense tokens [B, Lc, C]; each sample for itself."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.use_rope:
            self.rope = SparseRotaryPositionEmbedder(self.head_dim, rope_freq=kwargs.get("rope_freq", (1.0, 10000.0)))

    def forward(self, x, context=None):
        heads = (self.num_heads, self.head_dim)
        if self._type == "self":
            q, k, v = x.replace(self.to_qkv(x.feats).unflatten(-1, (3, *heads))).unbind(1)
            q, k = self._normed(q, k)
            if self.use_rope:
                q, k = self.rope(q, k)
            rows = [sdpa(q.feats[part][None], k.feats[part][None], v.feats[part][None])[0] for part in x.layout]
        else:
            q = x.replace(self.to_q(x.feats).unflatten(-1, heads))
            k, v = self.to_kv(context).unflatten(-1, (2, *heads)).unbind(2)
            q, k = self._normed(q, k)
            rows = [sdpa(q.feats[part][None], k[i : i + 1], v[i : i + 1])[0] for i, part in enumerate(x.layout)]
        return x.replace(self.to_out(torch.cat(rows).flatten(1)))


class FeedForwardNet(nn.Module):
    def __init__(self, channels, mlp_ratio=4.0):
        super().__init__()
        hidden = int(channels * mlp_ratio)
        self.mlp = nn.Sequential(nn.Linear(channels, hidden), nn.GELU("tanh"), nn.Linear(hidden, channels))

    def forward(self, x):
        return x.replace(self.mlp(x.feats)) if isinstance(x, SparseTensor) else self.mlp(x)


class _CrossBlock(nn.Module):
    """Self-attention under shift, scale and gate; cross-attention without; MLP under shift, scale and gate."""

    attention: type
    second = False

    def __init__(
        self,
        channels,
        ctx_channels,
        num_heads,
        mlp_ratio=4.0,
        use_checkpoint=False,
        use_rope=False,
        rope_freq=(1.0, 10000.0),
        qk_rms_norm=False,
        qk_rms_norm_cross=False,
        share_mod=False,
    ):
        super().__init__()
        self.use_checkpoint, self.share_mod = use_checkpoint, share_mod
        self.norm1, self.norm2, self.norm3 = (
            LayerNorm32(channels, elementwise_affine=affine, eps=1e-6) for affine in (False, True, False)
        )
        self.self_attn = self.attention(
            channels, num_heads=num_heads, type="self", use_rope=use_rope, rope_freq=rope_freq, qk_rms_norm=qk_rms_norm
        )
        self.cross_attn = self.attention(
            channels, ctx_channels=ctx_channels, num_heads=num_heads, type="cross", qk_rms_norm=qk_rms_norm_cross
        )
        self.mlp = FeedForwardNet(channels, mlp_ratio)
        if not share_mod:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(channels, 6 * channels))
        elif self.second:
            self.modulation = nn.Parameter(torch.zeros(6 * channels))

    def _chunks(self, mod):
        if not self.share_mod:
            mod = self.adaLN_modulation(mod)
        elif self.second:
            mod = (self.modulation + mod).type(mod.dtype)
        return mod.chunk(6, dim=1)

    def forward(self, x, mod, context, *phases):
        if self.use_checkpoint:
            return torch.utils.checkpoint.checkpoint(self._forward, x, mod, context, *phases, use_reentrant=False)
        return self._forward(x, mod, context, *phases)


class ModulatedTransformerCrossBlock(_CrossBlock):
    attention = MultiHeadAttention

    def _forward(self, x, mod, context, *phases):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = (part[:, None] for part in self._chunks(mod))
        h = self.norm1(x) * (1 + scale_msa) + shift_msa
        x = x + gate_msa * self.self_attn(h, **({"phases": phases[0]} if phases else {}))
        x = x + self.cross_attn(self.norm2(x), context)
        return x + gate_mlp * self.mlp(self.norm3(x) * (1 + scale_mlp) + shift_mlp)


class ModulatedTransformerCrossBlock2(ModulatedTransformerCrossBlock):
    second = True


class ModulatedSparseTransformerCrossBlock(_CrossBlock):
    attention = SparseMultiHeadAttention

    def _forward(self, x, mod, context):
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self._chunks(mod)
        h = x.replace(self.norm1(x.feats)) * (1 + scale_msa) + shift_msa
        x = x + self.self_attn(h) * gate_msa
        x = x + self.cross_attn(x.replace(self.norm2(x.feats)), context)
        h = x.replace(self.norm3(x.feats)) * (1 + scale_mlp) + shift_mlp
        return x + self.mlp(h) * gate_mlp


class ModulatedSparseTransformerCrossBlock2(ModulatedSparseTransformerCrossBlock):
    second = True


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size, frequency_embedding_size=256):
        super().__init__()
        self.width = frequency_embedding_size
        self.mlp = nn.Sequential(
            nn.Linear(frequency_embedding_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(
            -np.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
        )
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(self.mlp[0].weight.dtype))


def absolute_positions(places, channels):
    """sin and cos of whole-numbered places [N, 3], axis after axis: [N, channels]."""
    count = channels // 6
    frequencies = 10000 ** -(torch.arange(count, dtype=torch.float32, device=places.device) / count)
    angles = places[..., None].float() * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1).flatten(1), (0, channels - 6 * count))


def _grid(resolution):
    axis = torch.arange(resolution)
    return torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)


class _Flow(nn.Module):
    def __init__(self, **args):
        super().__init__()
        self.args = args
        for name in ("resolution", "in_channels", "model_channels", "cond_channels", "out_channels", "num_blocks"):
            setattr(self, name, args[name])
        self.num_heads = args.get("num_heads") or args["model_channels"] // args.get("num_head_channels", 64)
        self.pe_mode, self.share_mod = args.get("pe_mode", "ape"), args.get("share_mod", False)
        self.dtype = torch.float16 if args.get("use_fp16") else getattr(torch, args.get("dtype", "float32"))
        self.t_embedder = TimestepEmbedder(self.model_channels)
        if self.share_mod:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(self.model_channels, 6 * self.model_channels))

    def _blocks(self, kind):
        options = {
            name: self.args[name]
            for name in ("mlp_ratio", "use_checkpoint", "share_mod", "qk_rms_norm", "qk_rms_norm_cross", "rope_freq")
            if name in self.args
        }
        return nn.ModuleList(
            kind(
                self.model_channels,
                self.cond_channels,
                num_heads=self.num_heads,
                use_rope=self.pe_mode == "rope",
                **options,
            )
            for _ in range(self.num_blocks)
        )

    @property
    def device(self):
        return next(self.parameters()).device

    def convert_to(self, dtype):
        self.dtype = dtype
        self.blocks.to(dtype)
        return self

    def _time(self, t):
        time = self.t_embedder(t)
        return (self.adaLN_modulation(time) if self.share_mod else time).type(self.dtype)


class SparseStructureFlowModel(_Flow):
    """Velocity of z_s [B, C, r, r, r] at t [B] (0..1000) under cond [B, Lc, width]. patch_size cubes of cells become one token."""

    block = ModulatedTransformerCrossBlock

    def __init__(self, **args):
        super().__init__(**args)
        self.patch_size = args.get("patch_size", 1)
        side, cells = self.resolution // self.patch_size, self.patch_size**3
        if self.pe_mode == "ape":
            self.register_buffer("pos_emb", absolute_positions(_grid(side), self.model_channels))
        else:
            self.register_buffer(
                "rope_phases", RotaryPositionEmbedder(self.model_channels // self.num_heads)(_grid(side))
            )
        self.input_layer = nn.Linear(self.in_channels * cells, self.model_channels)
        self.blocks = self._blocks(self.block)
        self.out_layer = nn.Linear(self.model_channels, self.out_channels * cells)
        self.convert_to(self.dtype)

    def forward(self, x, t, cond):
        p, side = self.patch_size, self.resolution // self.patch_size
        h = x.reshape(len(x), -1, side, p, side, p, side, p).permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)
        h = self.input_layer(h)
        phases = () if self.pe_mode == "ape" else (self.rope_phases,)
        h = (h + self.pos_emb.to(h.dtype) if self.pe_mode == "ape" else h).type(self.dtype)
        time, cond = self._time(t), cond.type(self.dtype)
        for block in self.blocks:
            h = block(h, time, cond, *phases)
        h = h.type(x.dtype)
        h = self.out_layer(F.layer_norm(h, h.shape[-1:]))
        return (
            h.reshape(len(x), side, side, side, -1, p, p, p)
            .permute(0, 4, 1, 5, 2, 6, 3, 7)
            .reshape(x.shape[0], -1, *x.shape[2:])
        )


class SparseStructureFlowModel2(SparseStructureFlowModel):
    block = ModulatedTransformerCrossBlock2


class SparseLinear(nn.Linear):
    def forward(self, x):
        return x.replace(super().forward(x.feats))


class SubMConv3d(nn.Module):
    """Convolution 3³ that only reads and writes active voxels; weight [out, 3, 3, 3, in]."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_channels, 3, 3, 3, in_channels))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x):
        base = 2048
        places = x.coords.long()
        codes = ((places[:, 0] * base + places[:, 1] + 1) * base + places[:, 2] + 1) * base + places[:, 3] + 1
        order = codes.argsort()
        out = self.bias.expand(len(codes), -1)
        for shift in _grid(3).tolist():
            wanted = codes + (shift[0] - 1) * base * base + (shift[1] - 1) * base + shift[2] - 1
            found = order[torch.searchsorted(codes[order], wanted).clamp(max=len(codes) - 1)]
            there = (codes[found] == wanted)[:, None]
            out = out + torch.where(there, x.feats[found], 0) @ self.weight[:, shift[0], shift[1], shift[2]].T
        return x.replace(out)


class SparseConv3d(nn.Module):
    def __init__(self, in_channels, out_channels, kernel_size=3):
        super().__init__()
        self.conv = SubMConv3d(in_channels, out_channels)

    def forward(self, x):
        return self.conv(x)


class SparseDownsample(nn.Module):
    """Means over cells of 2³ voxels; as published, the zero that the sum starts from counts as one more. Kept for undoing it: the spatial cache."""

    def forward(self, x):
        small = x.coords.clone()
        small[:, 1:] //= 2
        coords, index = small.unique(dim=0, return_inverse=True)
        sums = x.feats.new_zeros(len(coords), x.feats.shape[1]).index_add(0, index, x.feats)
        feats = sums / (1 + index.bincount())[:, None].to(x.dtype)
        out = SparseTensor(
            feats,
            coords.int(),
            x.shape,
            scale=tuple(s // 2 if s > 1 else s / 2 for s in x._scale),
            spatial_cache=x._spatial_cache,
        )
        for key, value in (("coords", x.coords), ("layout", x.layout), ("index", index), ("scale", x._scale)):
            out.register_spatial_cache(key, value)
        return out


class SparseUpsample(nn.Module):
    def forward(self, x):
        coords, layout, index, scale = (x.get_spatial_cache(key) for key in ("coords", "layout", "index", "scale"))
        return SparseTensor(x.feats[index], coords, x.shape, layout, scale=scale, spatial_cache=x._spatial_cache)


class SparseResBlock3d(nn.Module):
    def __init__(self, channels, emb_channels, out_channels=None, downsample=False, upsample=False):
        super().__init__()
        out = out_channels or channels
        self.norm1, self.norm2 = (
            LayerNorm32(channels, elementwise_affine=True, eps=1e-6),
            LayerNorm32(out, elementwise_affine=False, eps=1e-6),
        )
        self.conv1, self.conv2 = SparseConv3d(channels, out), SparseConv3d(out, out)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_channels, 2 * out))
        self.skip_connection = SparseLinear(channels, out) if channels != out else nn.Identity()
        self.updown = SparseDownsample() if downsample else SparseUpsample() if upsample else None

    def forward(self, x, emb):
        scale, shift = self.emb_layers(emb).type(x.dtype).chunk(2, dim=1)
        x = x if self.updown is None else self.updown(x)
        h = self.conv1(x.replace(F.silu(self.norm1(x.feats))))
        h = h.replace(self.norm2(h.feats)) * (1 + scale) + shift
        return self.conv2(h.replace(F.silu(h.feats))) + self.skip_connection(x)


class SLatFlowModel(_Flow):
    """Velocity of latents on voxels. io_block_channels: convolution blocks around the transformer, each stage halves the grid (patch_size 2)."""

    block = ModulatedSparseTransformerCrossBlock

    def __init__(self, **args):
        super().__init__(**args)
        stages = list(args.get("io_block_channels") or [])
        per_stage, width = args.get("num_io_res_blocks", 2), self.model_channels
        first = stages[0] if stages else width
        self.input_layer = SparseLinear(self.in_channels, first)
        self.input_blocks, self.out_blocks = nn.ModuleList(), nn.ModuleList()
        for own, following in zip(stages, [*stages[1:], width]):
            self.input_blocks.extend(SparseResBlock3d(own, width) for _ in range(per_stage - 1))
            self.input_blocks.append(SparseResBlock3d(own, width, following, downsample=True))
        self.blocks = self._blocks(self.block)
        for own, before in zip(reversed(stages), [width, *reversed(stages[1:])]):
            self.out_blocks.append(SparseResBlock3d(2 * before, width, own, upsample=True))
            self.out_blocks.extend(SparseResBlock3d(2 * own, width, own) for _ in range(per_stage - 1))
        self.out_layer = SparseLinear(first, self.out_channels)
        self.convert_to(self.dtype)

    def forward(self, x, t, cond, concat_cond=None):
        h = x if concat_cond is None else x.replace(torch.cat([x.feats, concat_cond.feats], -1))
        h, time, cond = self.input_layer(h).type(self.dtype), self._time(t), cond.type(self.dtype)
        skips = []
        for block in self.input_blocks:
            h = block(h, time)
            skips.append(h.feats)
        if self.pe_mode == "ape":
            h = h.replace(h.feats + absolute_positions(h.coords[:, 1:], self.model_channels).type(self.dtype))
        for block in self.blocks:
            h = block(h, time, cond)
        for block, skip in zip(self.out_blocks, reversed(skips)):
            h = block(h.replace(torch.cat([h.feats, skip], 1)), time)
        h = h.type(x.dtype)
        return self.out_layer(h.replace(F.layer_norm(h.feats, h.feats.shape[-1:])))


class ElasticSLatFlowModel(SLatFlowModel):
    pass


class SLatFlowModel2(SLatFlowModel):
    block = ModulatedSparseTransformerCrossBlock2


class ElasticSLatFlowModel2(SLatFlowModel2):
    pass


class ResBlock3d(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, channels)
        self.conv1, self.conv2 = (nn.Conv3d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class UpsampleBlock3d(nn.Module):
    def __init__(self, channels, out):
        super().__init__()
        self.conv = nn.Conv3d(channels, 8 * out, 3, padding=1)

    def forward(self, x):
        b, _, d, h, w = x.shape
        return (
            self.conv(x)
            .reshape(b, -1, 2, 2, 2, d, h, w)
            .permute(0, 1, 5, 2, 6, 3, 7, 4)
            .reshape(b, -1, 2 * d, 2 * h, 2 * w)
        )


class SparseStructureDecoder(nn.Module):
    """z_s [B, C, r, r, r] -> logits [B, 1, R, R, R], R = r · 2^(number of channels − 1)."""

    def __init__(self, **args):
        super().__init__()
        self.args, channels = args, args["channels"]
        self.channels = channels
        self.input_layer = nn.Conv3d(args["latent_channels"], channels[0], 3, padding=1)
        self.middle_block = nn.Sequential(ResBlock3d(channels[0]))
        self.blocks = nn.ModuleList()
        for own, following in zip(channels, [*channels[1:], None]):
            self.blocks.append(ResBlock3d(own))
            if following:
                self.blocks.append(UpsampleBlock3d(own, following))
        self.out_layer = nn.Sequential(
            nn.GroupNorm(4, channels[-1]), nn.SiLU(), nn.Conv3d(channels[-1], args["out_channels"], 3, padding=1)
        )

    @property
    def device(self):
        return self.out_layer[2].weight.device

    def forward(self, z):
        h = self.middle_block(self.input_layer(z))
        for block in self.blocks:
            h = block(h)
        return self.out_layer(h)


def _boxes(coords, resolution):
    """Vertices [8 L, 3] in [−0.5, 0.5]³ and triangles [12 L, 3] of the voxels' boxes."""
    corners = _grid(2).to(coords.device)
    vertices = ((coords[:, None, 1:] + corners) / resolution - 0.5).reshape(-1, 3).float()
    quads = torch.tensor(
        [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]], device=coords.device
    )
    triangles = torch.cat([quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]])
    return vertices, (triangles + 8 * torch.arange(len(coords), device=coords.device)[:, None, None]).reshape(-1, 3)


class MeshExtractResult:
    def __init__(self, vertices, faces, vertex_attrs=None, res=64):
        self.vertices, self.faces, self.vertex_attrs, self.res = vertices, faces.long(), vertex_attrs, res
        self.success = len(vertices) > 0 and len(faces) > 0


class Gaussian:
    """Parameters in TRELLIS's form: places in [0, 1], sizes before the softplus with a bias, opacity before the sigmoid with a bias."""

    def __init__(self, xyz, features_dc, scaling, rotation, opacity, scaling_bias=0.02, opacity_bias=0.1):
        self._xyz, self._features_dc, self._scaling, self._rotation, self._opacity = (
            xyz,
            features_dc,
            scaling,
            rotation,
            opacity,
        )
        self._scale_bias, self._opacity_bias = (
            float(np.log(np.expm1(scaling_bias))),
            float(np.log(opacity_bias / (1 - opacity_bias))),
        )

    get_xyz = property(lambda self: self._xyz - 0.5)
    get_features = property(lambda self: self._features_dc)
    get_scaling = property(lambda self: F.softplus(self._scaling + self._scale_bias))
    get_rotation = property(
        lambda self: F.normalize(self._rotation + self._rotation.new_tensor([1.0, 0, 0, 0]), dim=-1)
    )
    get_opacity = property(lambda self: torch.sigmoid(self._opacity + self._opacity_bias))


class Strivec:
    """A radiance field by products of vectors: one box for each voxel."""

    def __init__(self, position, depth, trivec, density, features_dc):
        self.position, self.depth, self.trivec, self.density, self.features_dc = (
            position,
            depth,
            trivec,
            density,
            features_dc,
        )


class _Decoder(nn.Module):
    def __init__(self, **args):
        super().__init__()
        self.args, self.resolution = args, args["resolution"]
        self.input_layer = SparseLinear(args["latent_channels"], args["model_channels"])
        self.out_layer = SparseLinear(args["model_channels"], self.out_channels)

    @property
    def device(self):
        return self.out_layer.weight.device

    def forward(self, x):
        h = self.input_layer(x)
        h = self.out_layer(h.replace(F.layer_norm(F.gelu(h.feats), h.feats.shape[-1:])))
        return [self.represent(h.coords[part], h.feats[part]) for part in h.layout]


class SLatMeshDecoder(_Decoder):
    out_channels = 6

    def represent(self, coords, feats):
        vertices, faces = _boxes(coords, self.resolution)
        return MeshExtractResult(vertices, faces, feats.sigmoid().repeat_interleave(8, 0), self.resolution)


class SLatGaussianDecoder(_Decoder):
    out_channels = 14

    def represent(self, coords, feats):
        centres = (coords[:, 1:].float() + 0.5) / self.resolution
        offset, color, scaling, rotation, opacity = feats.split([3, 3, 3, 4, 1], -1)
        return Gaussian(
            centres + offset.tanh() / self.resolution, color[:, None], 0.1 * scaling, 0.1 * rotation, opacity
        )


class SLatRadianceFieldDecoder(_Decoder):
    out_channels = 16

    def represent(self, coords, feats):
        place = coords[:, 1:].float() / self.resolution
        return Strivec(
            place,
            torch.full((len(coords), 1), int(np.log2(self.resolution)), dtype=torch.uint8),
            feats[:, :12].reshape(-1, 1, 3, 4),
            feats[:, 12:13],
            feats[:, None, 13:],
        )


class FlowEulerSampler:
    repeats = True  # one condition is repeated for a batch; the second generation does not

    def __init__(self, sigma_min):
        self.sigma_min = sigma_min

    def _pred_to_xstart(self, x_t, t, pred):
        return (1 - self.sigma_min) * x_t - (self.sigma_min + (1 - self.sigma_min) * t) * pred

    def _xstart_to_pred(self, x_t, t, x_0):
        return ((1 - self.sigma_min) * x_t - x_0) / (self.sigma_min + (1 - self.sigma_min) * t)

    def _inference_model(self, model, x_t, t, cond=None, **kwargs):
        times = torch.tensor([1000 * t] * x_t.shape[0], device=x_t.device, dtype=torch.float32)
        if self.repeats and cond is not None and len(cond) == 1 and x_t.shape[0] > 1:
            cond = cond.repeat(x_t.shape[0], *[1] * (cond.ndim - 1))
        return model(x_t, times, cond, **kwargs)

    @torch.no_grad()
    def sample_once(self, model, x_t, t, t_prev, cond=None, **kwargs):
        pred_v = self._inference_model(model, x_t, t, cond, **kwargs)
        return SimpleNamespace(pred_x_prev=x_t - (t - t_prev) * pred_v, pred_x_0=self._pred_to_xstart(x_t, t, pred_v))

    @torch.no_grad()
    def sample(self, model, noise, cond=None, steps=50, rescale_t=1.0, verbose=True, tqdm_desc="", **kwargs):
        grid = np.linspace(1, 0, steps + 1)
        grid = (rescale_t * grid / (1 + (rescale_t - 1) * grid)).tolist()
        found = SimpleNamespace(samples=noise, pred_x_t=[], pred_x_0=[])
        for t, t_prev in pairwise(grid):
            out = self.sample_once(model, found.samples, t, t_prev, cond, **kwargs)
            found.samples = out.pred_x_prev
            found.pred_x_t.append(out.pred_x_prev)
            found.pred_x_0.append(out.pred_x_0)
        return found


class FlowEulerGuidanceIntervalSampler(FlowEulerSampler):
    """First generation: (1 + w) v − w v∅ inside the interval, positive call first."""

    def _inference_model(self, model, x_t, t, cond, neg_cond, cfg_strength, cfg_interval, **kwargs):
        pred = super()._inference_model(model, x_t, t, cond, **kwargs)
        if not cfg_interval[0] <= t <= cfg_interval[1]:
            return pred
        return (1 + cfg_strength) * pred - cfg_strength * super()._inference_model(model, x_t, t, neg_cond, **kwargs)

    def sample(
        self,
        model,
        noise,
        cond,
        neg_cond,
        steps=50,
        rescale_t=1.0,
        cfg_strength=3.0,
        cfg_interval=(0.0, 1.0),
        verbose=True,
        **kwargs,
    ):
        return super().sample(
            model,
            noise,
            cond,
            steps,
            rescale_t,
            verbose,
            neg_cond=neg_cond,
            cfg_strength=cfg_strength,
            cfg_interval=cfg_interval,
            **kwargs,
        )


class FlowEulerCfgSampler(FlowEulerSampler):
    def _inference_model(self, model, x_t, t, cond, neg_cond, cfg_strength, **kwargs):
        pred = super()._inference_model(model, x_t, t, cond, **kwargs)
        return (1 + cfg_strength) * pred - cfg_strength * super()._inference_model(model, x_t, t, neg_cond, **kwargs)


class FlowEulerGuidanceIntervalSampler2(FlowEulerSampler):
    """Second generation: g v + (1 − g) v∅ inside the interval, g = 1 outside; then the standard deviation of the predicted data may be brought back."""

    repeats = False

    def _inference_model(
        self, model, x_t, t, cond, neg_cond, guidance_strength, guidance_interval, guidance_rescale=0.0, **kwargs
    ):
        strength = guidance_strength if guidance_interval[0] <= t <= guidance_interval[1] else 1
        if strength in (0, 1):
            return super()._inference_model(model, x_t, t, cond if strength else neg_cond, **kwargs)
        positive = super()._inference_model(model, x_t, t, cond, **kwargs)
        pred = strength * positive + (1 - strength) * super()._inference_model(model, x_t, t, neg_cond, **kwargs)
        if guidance_rescale > 0:
            wanted, clean = self._pred_to_xstart(x_t, t, positive), self._pred_to_xstart(x_t, t, pred)
            axes = list(range(1, clean.ndim))
            rescaled = clean * (wanted.std(dim=axes, keepdim=True) / clean.std(dim=axes, keepdim=True))
            pred = self._xstart_to_pred(x_t, t, guidance_rescale * rescaled + (1 - guidance_rescale) * clean)
        return pred

    def sample(
        self,
        model,
        noise,
        cond,
        neg_cond,
        steps=50,
        rescale_t=1.0,
        guidance_strength=3.0,
        guidance_interval=(0.0, 1.0),
        verbose=True,
        **kwargs,
    ):
        return super().sample(
            model,
            noise,
            cond,
            steps,
            rescale_t,
            verbose,
            neg_cond=neg_cond,
            guidance_strength=guidance_strength,
            guidance_interval=guidance_interval,
            **kwargs,
        )


class PatchEncoder(nn.Module):
    """Stands for DINOv2: pictures [B, 3, 56, 56] -> {"x_prenorm": [B, 1 + 4 + 16, width]}."""

    def __init__(self, width):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 14, 14)
        self.first = nn.Parameter(torch.zeros(5, width))

    def forward(self, images, is_training=False):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return {"x_prenorm": torch.cat([self.first.expand(len(tokens), -1, -1), tokens], 1)}


def _fill(module, seed, name, scale=1.0):
    """Weights from a stream of their own: as wide as the fan-in asks, nothing zero, so that every path carries something."""
    rng = generator(seed, "trellis miniature", name)
    for key, value in sorted(module.named_parameters()):
        random = torch.randn(value.shape, generator=rng)
        if key.endswith("gamma") or (value.ndim == 1 and key.endswith("weight")):
            value.data = 1 + 0.1 * random.to(value.dtype)
        else:
            fan = value[0].numel() if value.ndim > 1 else 16
            value.data = (scale * random / fan**0.5).to(value.dtype)
    return module.eval().requires_grad_(False)


class Pipeline:
    def __init__(self, models=None):
        self.models = {} if models is None else models

    @property
    def device(self):
        return next(next(iter(self.models.values())).parameters()).device

    def to(self, device):
        for model in self.models.values():
            model.to(device)

    def cuda(self):
        self.to("cuda")

    def cpu(self):
        self.to("cpu")

    @classmethod
    def from_pretrained(cls, path):
        args = json.loads((Path(path) / "pipeline.json").read_text())["args"]
        return cls({name: load_model(f"{path}/{place}") for name, place in args["models"].items()}, args)


def load_model(path):
    config = json.loads(Path(f"{path}.json").read_text())
    model = MODELS[config["name"]](**config["args"])
    model.load_state_dict(load_file(f"{path}.safetensors"))
    return model.eval().requires_grad_(False)


class TrellisImageTo3DPipeline(Pipeline):
    picture = 56

    def __init__(self, models=None, args=None):
        super().__init__(models)
        self._pretrained_args = args
        for stage in ("sparse_structure_sampler", "slat_sampler"):
            setattr(self, stage, SAMPLERS[args[stage]["name"]](**args[stage]["args"]))
            setattr(self, f"{stage}_params", args[stage]["params"])
        self.slat_normalization, self.rembg_session = args["slat_normalization"], None
        self._init_cond_model(args)

    def _init_cond_model(self, args):
        self.models["image_cond_model"] = _fill(
            PatchEncoder(self.models["sparse_structure_flow_model"].cond_channels), 0, args["image_cond_model"]
        )

    def preprocess_image(self, picture):
        pixels = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
        if picture.mode != "RGBA" or (pixels[..., 3] == 1).all():
            raise ModuleNotFoundError("No module named 'rembg'", name="rembg")
        rows, columns = np.nonzero(pixels[..., 3] > 0.8)
        centre, size = (
            ((columns.min() + columns.max()) / 2, (rows.min() + rows.max()) / 2),
            1.2 * max(np.ptp(columns), np.ptp(rows)),
        )
        crop = picture.crop(
            (centre[0] - size // 2, centre[1] - size // 2, centre[0] + size // 2, centre[1] + size // 2)
        ).resize((self.picture, self.picture))
        pixels = np.asarray(crop).astype(np.float32) / 255
        return Image.fromarray((pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8))

    def encode_image(self, images):
        pixels = [
            torch.from_numpy(
                np.asarray(image.convert("RGB").resize((self.picture, self.picture)), dtype=np.float32) / 255
            ).permute(2, 0, 1)
            for image in images
        ]
        features = self.models["image_cond_model"](torch.stack(pixels).to(self.device) * 2 - 1, is_training=True)[
            "x_prenorm"
        ]
        return F.layer_norm(features, features.shape[-1:])

    def get_cond(self, images):
        cond = self.encode_image(images)
        return {"cond": cond, "neg_cond": torch.zeros_like(cond)}

    def sample_sparse_structure(self, cond, num_samples=1, sampler_params=None):
        model = self.models["sparse_structure_flow_model"]
        noise = torch.randn(num_samples, model.in_channels, *[model.resolution] * 3).to(self.device)
        z_s = self.sparse_structure_sampler.sample(
            model, noise, **cond, **{**self.sparse_structure_sampler_params, **(sampler_params or {})}, verbose=True
        ).samples
        return torch.argwhere(self.models["sparse_structure_decoder"](z_s) > 0)[:, [0, 2, 3, 4]].int()

    def sample_slat(self, cond, coords, sampler_params=None):
        model = self.models["slat_flow_model"]
        noise = SparseTensor(torch.randn(len(coords), model.in_channels).to(self.device), coords)
        slat = self.slat_sampler.sample(
            model, noise, **cond, **{**self.slat_sampler_params, **(sampler_params or {})}, verbose=True
        ).samples
        std, mean = (torch.tensor(self.slat_normalization[name])[None].to(slat.device) for name in ("std", "mean"))
        return slat * std + mean

    def decode_slat(self, slat, formats=("mesh", "gaussian", "radiance_field")):
        names = {"mesh": "slat_decoder_mesh", "gaussian": "slat_decoder_gs", "radiance_field": "slat_decoder_rf"}
        return {format: self.models[name](slat) for format, name in names.items() if format in formats}

    @torch.no_grad()
    def run(
        self,
        image,
        num_samples=1,
        seed=42,
        sparse_structure_sampler_params=None,
        slat_sampler_params=None,
        formats=("mesh", "gaussian"),
        preprocess_image=True,
    ):
        cond = self.get_cond([self.preprocess_image(image) if preprocess_image else image])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            coords = self.sample_sparse_structure(cond, num_samples, sparse_structure_sampler_params)
            return self.decode_slat(self.sample_slat(cond, coords, slat_sampler_params), formats)


class Hi3DGenPipeline(TrellisImageTo3DPipeline):
    pass


class TrellisTextTo3DPipeline(TrellisImageTo3DPipeline):
    """Prompts instead of pictures: one token a letter, padded to 12; no prompt is the empty one."""

    length = 12

    def _init_cond_model(self, args):
        width = self.models["sparse_structure_flow_model"].cond_channels
        self.text_cond_model = {"model": _fill(nn.Embedding(128, width), 0, args["text_cond_model"])}
        self.text_cond_model["null_cond"] = self.encode_text([""])

    def encode_text(self, prompts):
        letters = [[min(ord(letter), 127) for letter in prompt[: self.length].ljust(self.length)] for prompt in prompts]
        features = self.text_cond_model["model"](torch.tensor(letters, device=self.device))
        return F.layer_norm(
            features + absolute_positions(torch.arange(self.length)[:, None].expand(-1, 3), features.shape[-1]),
            features.shape[-1:],
        )

    def get_cond(self, prompts):
        return {"cond": self.encode_text(prompts), "neg_cond": self.text_cond_model["null_cond"]}


class MeshWithVoxel:
    def __init__(self, vertices, faces, origin, voxel_size, coords, attrs, voxel_shape, layout):
        self.vertices, self.faces, self.origin, self.voxel_size = vertices, faces, torch.tensor(origin), voxel_size
        self.coords, self.attrs, self.voxel_shape, self.layout = coords, attrs, voxel_shape, layout

    def query_attrs(self, places):
        """Values of the voxel nearest to each place [N, 3]."""
        centres = (self.coords.float() + 0.5) * self.voxel_size + self.origin
        return self.attrs[torch.cdist(places, centres).argmin(-1)]

    def query_vertex_attrs(self):
        return self.query_attrs(self.vertices)


class FlexiDualGridVaeDecoder(nn.Module):
    """Shape latents -> (meshes, what each voxel was divided into)."""

    def __init__(self, **args):
        super().__init__()
        self.args, self.resolution = args, args["resolution"]
        self.out_layer = SparseLinear(args["latent_channels"], 1)

    def set_resolution(self, resolution):
        self.resolution = resolution

    def forward(self, x, return_subs=False):
        grid = self.args["grid"]
        vertices = [_boxes(x.coords[part], grid) for part in x.layout]
        meshes = [
            SimpleNamespace(vertices=places, faces=faces.int(), fill_holes=lambda: None) for places, faces in vertices
        ]
        return (meshes, [self.out_layer(x)]) if return_subs else meshes


class SparseUnetVaeDecoder(nn.Module):
    def __init__(self, **args):
        super().__init__()
        self.args = args
        self.out_layer = SparseLinear(args["latent_channels"], 6)

    def forward(self, x, guide_subs=None):
        return x.replace(self.out_layer(x).feats.tanh())


class DinoV3FeatureExtractor:
    """One token a patch of 16 pixels, so the number of tokens follows `image_size`."""

    def __init__(self, model_name, width, image_size=32):
        self.model, self.image_size = _fill(nn.Conv2d(3, width, 16, 16), 0, model_name), image_size

    def to(self, device):
        self.model.to(device)

    def cpu(self):
        self.to("cpu")

    @torch.no_grad()
    def __call__(self, images):
        size = (self.image_size // 16, self.image_size // 16)
        pixels = [
            torch.from_numpy(
                np.asarray(image.convert("RGB").resize((size[0] * 16, size[1] * 16)), dtype=np.float32) / 255
            ).permute(2, 0, 1)
            for image in images
        ]
        features = self.model(torch.stack(pixels) * 2 - 1).flatten(2).transpose(1, 2)
        return F.layer_norm(features, features.shape[-1:])


class Trellis2ImageTo3DPipeline(Pipeline):
    def __init__(self, models=None, args=None):
        super().__init__(models)
        self._pretrained_args = args
        for stage in ("sparse_structure_sampler", "shape_slat_sampler", "tex_slat_sampler"):
            setattr(self, stage, SAMPLERS2[args[stage]["name"]](**args[stage]["args"]))
            setattr(self, f"{stage}_params", args[stage]["params"])
        self.shape_slat_normalization, self.tex_slat_normalization = (
            args["shape_slat_normalization"],
            args["tex_slat_normalization"],
        )
        self.image_cond_model = DinoV3FeatureExtractor(**args["image_cond_model"]["args"])
        self.rembg_model, self.low_vram, self.default_pipeline_type = (
            None,
            args.get("low_vram", True),
            args.get("default_pipeline_type", "1024_cascade"),
        )
        self.pbr_attr_layout = {
            "base_color": slice(0, 3),
            "metallic": slice(3, 4),
            "roughness": slice(4, 5),
            "alpha": slice(5, 6),
        }
        self._device = "cpu"

    @property
    def device(self):
        return torch.device(self._device)

    def preprocess_image(self, picture):
        pixels = np.asarray(picture.convert("RGBA")).astype(np.float32) / 255
        return Image.fromarray((pixels[..., :3] * pixels[..., 3:] * 255).astype(np.uint8))

    def get_cond(self, images, resolution, include_neg_cond=True):
        self.image_cond_model.image_size = resolution // 16
        cond = self.image_cond_model(images)
        return {"cond": cond, "neg_cond": torch.zeros_like(cond)}

    def sample_sparse_structure(self, cond, resolution, num_samples=1, sampler_params=None):
        model = self.models["sparse_structure_flow_model"]
        noise = torch.randn(num_samples, model.in_channels, *[model.resolution] * 3).to(self.device)
        z_s = self.sparse_structure_sampler.sample(
            model, noise, **cond, **{**self.sparse_structure_sampler_params, **(sampler_params or {})}, verbose=True
        ).samples
        decoded = self.models["sparse_structure_decoder"](z_s) > 0
        if resolution != decoded.shape[2]:
            ratio = decoded.shape[2] // resolution
            decoded = F.max_pool3d(decoded.float(), ratio, ratio, 0) > 0.5
        return torch.argwhere(decoded)[:, [0, 2, 3, 4]].int()

    def _unscaled(self, slat, normalization):
        std, mean = (torch.tensor(normalization[name])[None].to(slat.device) for name in ("std", "mean"))
        return slat * std + mean

    def sample_shape_slat(self, cond, flow_model, coords, sampler_params=None):
        noise = SparseTensor(torch.randn(len(coords), flow_model.in_channels).to(self.device), coords)
        slat = self.shape_slat_sampler.sample(
            flow_model, noise, **cond, **{**self.shape_slat_sampler_params, **(sampler_params or {})}, verbose=True
        ).samples
        return self._unscaled(slat, self.shape_slat_normalization)

    def sample_tex_slat(self, cond, flow_model, shape_slat, sampler_params=None):
        std, mean = (torch.tensor(self.shape_slat_normalization[name])[None] for name in ("std", "mean"))
        shape_slat = (shape_slat - mean) / std
        noise = shape_slat.replace(
            torch.randn(len(shape_slat.feats), flow_model.in_channels - shape_slat.feats.shape[1])
        )
        params = {**self.tex_slat_sampler_params, **(sampler_params or {})}
        slat = self.tex_slat_sampler.sample(
            flow_model, noise, concat_cond=shape_slat, **cond, **params, verbose=True
        ).samples
        return self._unscaled(slat, self.tex_slat_normalization)

    @torch.no_grad()
    def decode_latent(self, shape_slat, tex_slat, resolution):
        decoder = self.models["shape_slat_decoder"]
        decoder.set_resolution(resolution)
        meshes, subs = decoder(shape_slat, return_subs=True)
        voxels = self.models["tex_slat_decoder"](tex_slat, guide_subs=subs) * 0.5 + 0.5
        grid = decoder.args["grid"]
        return [
            MeshWithVoxel(
                mesh.vertices,
                mesh.faces,
                [-0.5] * 3,
                1 / grid,
                voxels.coords[part][:, 1:],
                voxels.feats[part],
                torch.Size([1, 6, grid, grid, grid]),
                self.pbr_attr_layout,
            )
            for mesh, part in zip(meshes, voxels.layout)
        ]

    @torch.no_grad()
    def run(
        self,
        image,
        num_samples=1,
        seed=42,
        sparse_structure_sampler_params=None,
        shape_slat_sampler_params=None,
        tex_slat_sampler_params=None,
        preprocess_image=True,
        pipeline_type=None,
    ):
        cond = self.get_cond([self.preprocess_image(image) if preprocess_image else image], 512)
        side = self.models["shape_slat_flow_model_512"].resolution
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            coords = self.sample_sparse_structure(cond, side, num_samples, sparse_structure_sampler_params)
            shape = self.sample_shape_slat(
                cond, self.models["shape_slat_flow_model_512"], coords, shape_slat_sampler_params
            )
            texture = self.sample_tex_slat(cond, self.models["tex_slat_flow_model_512"], shape, tex_slat_sampler_params)
        return self.decode_latent(shape, texture, 512)


MODELS = {
    kind.__name__: kind
    for kind in (
        SparseStructureFlowModel,
        SLatFlowModel,
        ElasticSLatFlowModel,
        SparseStructureDecoder,
        SLatMeshDecoder,
        SLatGaussianDecoder,
        SLatRadianceFieldDecoder,
        SparseStructureFlowModel2,
        SLatFlowModel2,
        ElasticSLatFlowModel2,
        FlexiDualGridVaeDecoder,
        SparseUnetVaeDecoder,
    )
}
SAMPLERS = {kind.__name__: kind for kind in (FlowEulerSampler, FlowEulerCfgSampler, FlowEulerGuidanceIntervalSampler)}
SAMPLERS2 = {
    "FlowEulerSampler": FlowEulerSampler,
    "FlowEulerGuidanceIntervalSampler": FlowEulerGuidanceIntervalSampler2,
}

WIDTH, CONDITION, CHANNELS, SIDE, GRID = 36, 24, 4, 4, 16
_TORSO = {
    "model_channels": WIDTH,
    "cond_channels": CONDITION,
    "num_blocks": 2,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "qk_rms_norm": True,
}
_DECODER = {
    "out_channels": 1,
    "latent_channels": CHANNELS,
    "num_res_blocks": 1,
    "num_res_blocks_middle": 1,
    "channels": [16, 8, 8],
    "norm_type": "group",
}


def _write(folder, name, config, seed, share=None):
    """One model: ckpts/NAME.json and ckpts/NAME.safetensors. share: of a structure decoder, how many voxels are filled."""
    model = _fill(MODELS[config["name"]](**config["args"]), seed, name)
    if share is not None:
        logits = model(
            torch.randn(4, CHANNELS, SIDE, SIDE, SIDE, generator=generator(seed, "trellis miniature", "latents"))
        )
        model.out_layer[2].bias.data -= logits.quantile(1 - share)
    place = Path(folder) / "ckpts"
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{name}.json").write_text(json.dumps(config, indent=1))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, str(place / f"{name}.safetensors")
    )
    return f"ckpts/{name}"


def _normalization(channels, seed):
    rng = generator(seed, "trellis miniature", "normalization", channels)
    return {
        "mean": (0.3 * torch.randn(channels, generator=rng)).tolist(),
        "std": (1 + 0.2 * torch.rand(channels, generator=rng)).tolist(),
    }


def write_trellis(folder, *, seed=0, kind="TrellisImageTo3DPipeline", steps=4):
    """A checkpoint of the first generation: 16³ voxels, structure latent 4 × 4³, 8 latent channels, one halving of the grid before the SLAT transformer.

    kind: TrellisImageTo3DPipeline, TrellisTextTo3DPipeline or Hi3DGenPipeline (no Gaussians there).
    """
    flow = {
        **_TORSO,
        "resolution": SIDE,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "patch_size": 1,
        "pe_mode": "ape",
    }
    slat = {
        **_TORSO,
        "resolution": GRID,
        "in_channels": 8,
        "out_channels": 8,
        "patch_size": 2,
        "io_block_channels": [12],
        "num_io_res_blocks": 2,
        "pe_mode": "ape",
    }
    decoder = {"resolution": GRID, "latent_channels": 8, "model_channels": 16}
    models = {
        "sparse_structure_decoder": _write(
            folder, "ss_dec_conv3d_16l8", {"name": "SparseStructureDecoder", "args": _DECODER}, seed, share=0.025
        ),
        "sparse_structure_flow_model": _write(
            folder, "ss_flow_img_dit_L_16l8", {"name": "SparseStructureFlowModel", "args": flow}, seed
        ),
        "slat_flow_model": _write(
            folder, "slat_flow_img_dit_L_64l8p2", {"name": "ElasticSLatFlowModel", "args": slat}, seed
        ),
        "slat_decoder_mesh": _write(
            folder, "slat_dec_mesh_swin8_B_64l8m256c", {"name": "SLatMeshDecoder", "args": decoder}, seed
        ),
    }
    if kind != "Hi3DGenPipeline":
        models["slat_decoder_gs"] = _write(
            folder, "slat_dec_gs_swin8_B_64l8gs32", {"name": "SLatGaussianDecoder", "args": decoder}, seed
        )
        models["slat_decoder_rf"] = _write(
            folder, "slat_dec_rf_swin8_B_64l8r16", {"name": "SLatRadianceFieldDecoder", "args": decoder}, seed
        )
    sampler = {
        "name": "FlowEulerGuidanceIntervalSampler",
        "args": {"sigma_min": 1e-5},
        "params": {"steps": steps, "cfg_strength": 5.0, "cfg_interval": [0.5, 1.0], "rescale_t": 3.0},
    }
    condition = (
        {"text_cond_model": "openai/clip-vit-large-patch14"}
        if kind == "TrellisTextTo3DPipeline"
        else {"image_cond_model": "dinov2_vitl14_reg"}
    )
    args = {
        "models": models,
        "sparse_structure_sampler": sampler,
        "slat_sampler": sampler,
        "slat_normalization": _normalization(8, seed),
        **condition,
    }
    (Path(folder) / "pipeline.json").write_text(json.dumps({"name": kind, "args": args}, indent=1))
    return Path(folder)


def write_trellis2(folder, *, seed=0, steps=4):
    """A checkpoint of the second generation: rotary positions, normed cross-attention, modulation shared by the blocks, shape latents, then texture latents that read them."""
    torso = {**_TORSO, "pe_mode": "rope", "share_mod": True, "qk_rms_norm_cross": True}
    flow = {**torso, "resolution": SIDE, "in_channels": CHANNELS, "out_channels": CHANNELS}
    shape, texture = (
        {**torso, "resolution": GRID // 2, "in_channels": channels, "out_channels": 6} for channels in (6, 12)
    )
    models = {
        "sparse_structure_decoder": _write(
            folder, "ss_dec_conv3d_16l8", {"name": "SparseStructureDecoder", "args": _DECODER}, seed, share=0.02
        ),
        "sparse_structure_flow_model": _write(
            folder, "ss_flow_img_dit_1_3B_64", {"name": "SparseStructureFlowModel2", "args": flow}, seed
        ),
        "shape_slat_flow_model_512": _write(
            folder, "slat_flow_img2shape_dit_1_3B_512", {"name": "ElasticSLatFlowModel2", "args": shape}, seed
        ),
        "tex_slat_flow_model_512": _write(
            folder, "slat_flow_imgshape2tex_dit_1_3B_512", {"name": "ElasticSLatFlowModel2", "args": texture}, seed
        ),
        "shape_slat_decoder": _write(
            folder,
            "shape_dec_next_dc_f16c32",
            {"name": "FlexiDualGridVaeDecoder", "args": {"resolution": 512, "latent_channels": 6, "grid": GRID // 2}},
            seed,
        ),
        "tex_slat_decoder": _write(
            folder, "tex_dec_next_dc_f16c32", {"name": "SparseUnetVaeDecoder", "args": {"latent_channels": 6}}, seed
        ),
    }

    def sampler(**params):
        return {
            "name": "FlowEulerGuidanceIntervalSampler",
            "args": {"sigma_min": 1e-5},
            "params": {
                "steps": steps,
                "guidance_strength": 7.5,
                "guidance_interval": [0.6, 1.0],
                "rescale_t": 5.0,
                **params,
            },
        }

    args = {
        "models": models,
        "sparse_structure_sampler": sampler(guidance_rescale=0.7),
        "shape_slat_sampler": sampler(guidance_rescale=0.5, rescale_t=3.0),
        "tex_slat_sampler": sampler(guidance_strength=1.0, guidance_interval=[0.6, 0.9], rescale_t=3.0),
        "shape_slat_normalization": _normalization(6, seed),
        "tex_slat_normalization": _normalization(6, seed + 1),
        "image_cond_model": {
            "name": "DinoV3FeatureExtractor",
            "args": {"model_name": "facebook/dinov3-vitl16-pretrain-lvd1689m", "width": CONDITION},
        },
        "rembg_model": {"name": "BiRefNet", "args": {"model_name": "briaai/RMBG-2.0"}},
        "low_vram": False,
        "default_pipeline_type": "512",
    }
    (Path(folder) / "pipeline.json").write_text(
        json.dumps({"name": "Trellis2ImageTo3DPipeline", "args": args}, indent=1)
    )
    return Path(folder)


def trellis(folder, **options):
    """The pipeline of `write_trellis`."""
    name = options.get("kind", "TrellisImageTo3DPipeline")
    return globals()[name].from_pretrained(write_trellis(folder, **options))


def trellis2(folder, **options):
    """The pipeline of `write_trellis2`."""
    return Trellis2ImageTo3DPipeline.from_pretrained(write_trellis2(folder, **options))


def picture(kind="red", size=64):
    """A drawn RGBA picture: a coloured shape on nothing."""
    pixels = np.zeros((size, size, 4), np.uint8)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    inside = {
        "red": rows**2 + columns**2 < 0.1,
        "blue": (abs(rows) < 0.15) & (abs(columns) < 0.35),
        "green": abs(rows) + abs(columns) < 0.4,
    }[kind]
    pixels[inside] = {"red": (220, 60, 40, 255), "blue": (40, 80, 220, 255), "green": (60, 190, 80, 255)}[kind]
    return Image.fromarray(pixels)


@contextmanager
def as_package(*names):
    """While inside, `import NAME.pipelines` finds the pipelines of this file. names: of trellis, trellis2, hi3dgen."""
    before = {key: value for key, value in sys.modules.items() if key.split(".")[0] in names}
    for name in names:
        package, pipelines = ModuleType(name), ModuleType(f"{name}.pipelines")
        package.__path__, package.pipelines = [], pipelines
        package.__spec__, pipelines.__spec__ = ModuleSpec(name, None), ModuleSpec(f"{name}.pipelines", None)
        for kind in (TrellisImageTo3DPipeline, TrellisTextTo3DPipeline, Hi3DGenPipeline, Trellis2ImageTo3DPipeline):
            setattr(pipelines, kind.__name__, kind)
        sys.modules[name], sys.modules[f"{name}.pipelines"] = package, pipelines
    try:
        yield
    finally:
        for name in names:
            for key in [key for key in sys.modules if key.split(".")[0] == name]:
                del sys.modules[key]
        sys.modules.update(before)
