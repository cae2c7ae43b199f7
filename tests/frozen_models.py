"""Frozen models written by hand from the papers' equations and a model's weights: the oracle.

Each function takes (model, x, mlp, ...) with x the input of the first layer, and returns the
output of the last. Attention weights, gates, decays and scales of norms are detached; `mlp` is
"omitted" (detached) or "jacobian" (differentiated as it is). Nothing of dsf is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt().detach() * weight


def layer_norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + norm.eps).rsqrt().detach()
    return centred * scale * norm.weight + norm.bias


def gated(x: Tensor) -> Tensor:
    """silu with its gate constant."""
    return x * torch.sigmoid(x).detach()


def heads_of(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) detached, times v; heads back in the last axis."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.mT * scale).masked_fill(~seen, -math.inf)
    return (logits.softmax(-1).detach() @ v).transpose(1, 2).flatten(-2)


def causal(length: int, window: int | None = None) -> Tensor:
    lag = torch.arange(length)[:, None] - torch.arange(length)
    return (lag >= 0) if window is None else (lag >= 0) & (lag < window)


def rotated(x: Tensor, inverse: Tensor) -> Tensor:
    """Rotary positions on the first 2 len(inverse) features, in halves."""
    width = 2 * len(inverse)
    angle = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * inverse.to(x.dtype)
    cos, sin = angle.cos(), angle.sin()
    a, b, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def added_mlp(made: Tensor, mlp: str) -> Tensor:
    return made.detach() if mlp == "omitted" else made


def convolved(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution of x (batch, time, channel), weight (channel, kernel)."""
    kernel, y = weight.shape[1], torch.zeros_like(x)
    for lag in range(kernel):
        late = torch.cat([torch.zeros_like(x[:, :lag]), x[:, : x.shape[1] - lag]], 1)
        y = y + late * weight[:, kernel - 1 - lag]
    return y if bias is None else y + bias


# -- mixers ------------------------------------------------------------------------------------


def llama_mixer(layer: Any, x: Tensor, inverse: Tensor, window: int | None = None) -> Tensor:
    width = layer.head_dim
    q, k, v = (heads_of(p(x), p.out_features // width)
               for p in (layer.q_proj, layer.k_proj, layer.v_proj))  # fmt: skip
    q, k = rotated(q, inverse), rotated(k, inverse)
    return layer.o_proj(attend(q, k, v, causal(x.shape[1], window), width**-0.5))


def mamba_mixer(mixer: Any, x: Tensor) -> Tensor:
    u, z = mixer.in_proj(x).chunk(2, -1)
    u = gated(convolved(u, mixer.conv1d.weight[:, 0], mixer.conv1d.bias))
    n = mixer.A_log.shape[1]
    low, B, C = mixer.x_proj(u).detach().split([mixer.time_step_rank, n, n], -1)
    step = functional.softplus(mixer.dt_proj(low)).detach()
    A, state, outputs = -mixer.A_log.exp(), 0.0, []
    for t in range(x.shape[1]):
        dt = step[:, t, :, None]
        state = (dt * A).exp() * state + dt * B[:, t, None] * u[:, t, :, None]
        outputs.append((state * C[:, t, None]).sum(-1))
    y = torch.stack(outputs, 1) + mixer.D * u
    return mixer.out_proj(y * functional.silu(z).detach())


def mamba2_mixer(mixer: Any, x: Tensor) -> Tensor:
    heads, width, n, groups = (mixer.num_heads, mixer.head_dim, mixer.ssm_state_size,
                               mixer.n_groups)  # fmt: skip
    inner = heads * width
    z, conv, dt = mixer.in_proj(x).split([inner, inner + 2 * groups * n, heads], -1)
    conv = gated(convolved(conv, mixer.conv1d.weight[:, 0], mixer.conv1d.bias))
    u, B, C = conv.split([inner, groups * n, groups * n], -1)
    u = u.unflatten(-1, (heads, width))
    B, C = (a.detach().unflatten(-1, (groups, n)).repeat_interleave(heads // groups, 2)
            for a in (B, C))  # fmt: skip
    dt = functional.softplus(dt + mixer.dt_bias).detach()
    A, state, outputs = -mixer.A_log.exp(), 0.0, []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = decay * state + (dt[:, t, :, None] * B[:, t])[..., None] * u[:, t, :, None]
        outputs.append((C[:, t, ..., None] * state).sum(-2))
    y = torch.stack(outputs, 1) + mixer.D[:, None] * u
    y = y.flatten(-2) * functional.silu(z).detach()
    group = mixer.norm.group_size
    scale = (y.unflatten(-1, (-1, group)).square().mean(-1, keepdim=True)
             + mixer.norm.variance_epsilon).rsqrt().detach()  # fmt: skip
    y = (y.unflatten(-1, (-1, group)) * scale).flatten(-2) * mixer.norm.weight
    return mixer.out_proj(y)


def rglru_mixer(block: Any, x: Tensor) -> Tensor:
    unit = block.rg_lru
    branch = functional.gelu(block.linear_y(x), approximate="tanh").detach()
    u = convolved(block.linear_x(x), block.conv_1d.weight[:, 0], block.conv_1d.bias)

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        parts = u.unflatten(-1, (unit.num_attention_heads, -1))
        return torch.sigmoid(torch.einsum("bthi,hij->bthj", parts, weight) + bias).flatten(-2)

    entry = gate(unit.input_gate_weight, unit.input_gate_bias).detach()
    recur = gate(unit.recurrent_gate_weight, unit.recurrent_gate_bias).detach()
    decay = (-8 * recur * functional.softplus(unit.recurrent_param)).exp()
    root = (1 - decay.square()).sqrt()
    state, outputs = 0.0, []
    for t in range(x.shape[1]):
        first = t == 0  # the state is reset at position 0, and the input not scaled there
        value = entry[:, t] * u[:, t] * (1.0 if first else root[:, t])
        state = value if first else decay[:, t] * state + value
        outputs.append(state)
    return block.linear_out(torch.stack(outputs, 1) * branch)


# -- whole stacks --------------------------------------------------------------------------------


def llama(model: Any, x: Tensor, mlp: str) -> Tensor:
    for layer in model.layers:
        before, after = layer.input_layernorm, layer.post_attention_layernorm
        h = rms(x, before.weight, before.variance_epsilon)
        x = x + llama_mixer(layer.self_attn, h, model.rotary_emb.inv_freq)
        h = rms(x, after.weight, after.variance_epsilon)
        gate, up = functional.silu(layer.mlp.gate_proj(h)), layer.mlp.up_proj(h)
        x = x + added_mlp(layer.mlp.down_proj(gate * up), mlp)
    return x


def bert(model: Any, x: Tensor, mlp: str, mask: Tensor) -> Tensor:
    for layer in model.encoder.layer:
        own = layer.attention.self
        q, k, v = (heads_of(p(x), own.num_attention_heads)
                   for p in (own.query, own.key, own.value))  # fmt: skip
        y = attend(q, k, v, mask.bool()[:, None, None], q.shape[-1] ** -0.5)
        made = layer.attention.output
        x = layer_norm(x + made.dense(y), made.LayerNorm)
        inner = added_mlp(functional.gelu(layer.intermediate.dense(x)), mlp)
        x = layer_norm(x + layer.output.dense(inner), layer.output.LayerNorm)
    return x


def mamba(model: Any, x: Tensor, mlp: str) -> Tensor:
    mixers = {"MambaMixer": mamba_mixer, "Mamba2Mixer": mamba2_mixer}
    for layer in model.layers:
        h = rms(x, layer.norm.weight, layer.norm.variance_epsilon)
        x = x + mixers[type(layer.mixer).__name__](layer.mixer, h)
    return x


def albert(model: Any, x: Tensor, mlp: str, mask: Tensor) -> Tensor:
    """One layer, shared by all places."""
    layer = model.encoder.albert_layer_groups[0].albert_layers[0]
    own, seen = layer.attention, mask.bool()[:, None, None]
    for _ in range(model.config.num_hidden_layers):
        q, k, v = (heads_of(p(x), own.num_attention_heads)
                   for p in (own.query, own.key, own.value))  # fmt: skip
        y = own.dense(attend(q, k, v, seen, q.shape[-1] ** -0.5))
        x = layer_norm(x + y, own.LayerNorm)
        inner = functional.gelu(layer.ffn(x), approximate="tanh")
        made = added_mlp(layer.ffn_output(inner), mlp)
        x = layer_norm(x + made, layer.full_layer_layer_norm)
    return x


def lfm_convolution(layer: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Between two gates, the first and second thirds of the projection, both constant."""
    gate, gate_out, u = layer.in_proj(x * mask[..., None]).chunk(3, -1)
    y = convolved(gate.detach() * u, layer.conv.weight[:, 0], layer.conv.bias)
    return layer.out_proj(gate_out.detach() * y)


def lfm_attention(layer: Any, x: Tensor, inverse: Tensor, mask: Tensor) -> Tensor:
    """Normed queries and keys; LFM3 has other names, and a gate for each head."""
    width, third = layer.head_dim, hasattr(layer, "q_norm")
    a, b, out = (
        (layer.q_norm, layer.k_norm, layer.o_proj) if third
        else (layer.q_layernorm, layer.k_layernorm, layer.out_proj)
    )  # fmt: skip
    q, k, v = (p(x).unflatten(-1, (-1, width)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = rms(q, a.weight, a.variance_epsilon), rms(k, b.weight, b.variance_epsilon)
    q, k = rotated(q.transpose(1, 2), inverse), rotated(k.transpose(1, 2), inverse)
    seen = causal(x.shape[1]) & mask.bool()[:, None, None]
    y = attend(q, k, v.transpose(1, 2), seen, width**-0.5)
    if third and layer.g_proj is not None:
        gate = torch.sigmoid(layer.g_proj(x)).detach()
        y = (y.unflatten(-1, (-1, width)) * gate[..., None]).flatten(-2)
    return out(y)


def lfm(model: Any, x: Tensor, mlp: str, mask: Tensor) -> Tensor:
    """LFM2 and LFM3: short convolutions and attention, with or without norms behind them."""
    found = dict(model.named_buffers())
    inverse = next(x for n, x in found.items() if n.endswith("inv_freq") and "original" not in n)
    for layer in model.layers:
        before, after = layer.operator_norm, layer.ffn_norm
        h = rms(x, before.weight, before.variance_epsilon)
        if hasattr(layer, "conv"):
            made = lfm_convolution(layer.conv, h, mask)
        else:
            made = lfm_attention(layer.self_attn, h, inverse, mask)
        x = x + behind(layer, "post_operator_norm", made)
        h, m = rms(x, after.weight, after.variance_epsilon), layer.feed_forward
        made = added_mlp(m.w2(functional.silu(m.w1(h)) * m.w3(h)), mlp)
        x = x + behind(layer, "post_ffn_norm", made)
    return x


def behind(layer: Any, name: str, x: Tensor) -> Tensor:
    norm = getattr(layer, name, None)
    return rms(x, norm.weight, norm.variance_epsilon) if hasattr(norm, "weight") else x


def bart_decoder(
    model: Any, x: Tensor, read: Tensor, mlp: str, own_mask: Tensor, mask: Tensor
) -> Tensor:
    for layer in model.decoder.layers:

        def mixed(own: Any, h: Tensor, source: Tensor, seen: Tensor) -> Tensor:
            q, k, v = (
                heads_of(p(y), own.num_heads)
                for p, y in ((own.q_proj, h), (own.k_proj, source), (own.v_proj, source))
            )
            return own.out_proj(attend(q, k, v, seen, q.shape[-1] ** -0.5))  # fmt: skip

        seen = causal(x.shape[1]) & own_mask[:, None, None]
        x = layer_norm(x + mixed(layer.self_attn, x, x, seen), layer.self_attn_layer_norm)
        cross = mixed(layer.encoder_attn, x, read, mask[:, None, None])
        x = layer_norm(x + cross, layer.encoder_attn_layer_norm)
        made = added_mlp(layer.fc2(functional.gelu(layer.fc1(x))), mlp)
        x = layer_norm(x + made, layer.final_layer_norm)
    return x


def t5_decoder(
    model: Any, x: Tensor, read: Tensor, mlp: str, own_mask: Tensor, mask: Tensor
) -> Tensor:
    first = model.decoder.block[0].layer[0].SelfAttention
    bias = first.compute_bias(x.shape[1], x.shape[1]).detach()
    for block in model.decoder.block:

        def mixed(own: Any, h: Tensor, source: Tensor, seen: Tensor, bias: Tensor) -> Tensor:
            q, k, v = (
                heads_of(p(y), own.n_heads)
                for p, y in ((own.q, h), (own.k, source), (own.v, source))
            )
            logits = (q @ k.mT + bias).masked_fill(~seen, -math.inf)
            return own.o((logits.softmax(-1).detach() @ v).transpose(1, 2).flatten(-2))

        one, two, three = block.layer
        h = rms(x, one.layer_norm.weight, one.layer_norm.variance_epsilon)
        seen = causal(x.shape[1]) & own_mask[:, None, None]
        x = x + mixed(one.SelfAttention, h, h, seen, bias)
        h = rms(x, two.layer_norm.weight, two.layer_norm.variance_epsilon)
        x = x + mixed(two.EncDecAttention, h, read, mask[:, None, None], x.new_zeros(()))
        h, m = rms(x, three.layer_norm.weight, three.layer_norm.variance_epsilon), three
        inner = functional.relu(m.DenseReluDense.wi(h))
        x = x + added_mlp(m.DenseReluDense.wo(inner), mlp)
    return x


def recurrent_gemma(model: Any, x: Tensor, mlp: str) -> Tensor:
    for layer in model.layers:
        before, after, mixer = (
            layer.temporal_pre_norm,
            layer.channel_pre_norm,
            layer.temporal_block,
        )
        h = rms(x, 1 + before.weight, before.eps)
        if hasattr(mixer, "rg_lru"):
            made = rglru_mixer(mixer, h)
        else:
            made = llama_mixer(mixer, h, mixer.rotary_emb.inv_freq, mixer.sliding_window)
        x = x + made
        h, m = rms(x, 1 + after.weight, after.eps), layer.mlp_block
        gate = functional.gelu(m.gate_proj(h), approximate="tanh")
        x = x + added_mlp(m.down_proj(gate * m.up_proj(h)), mlp)
    return x


def torch_encoder(model: Any, x: Tensor, mlp: str) -> Tensor:
    for layer in model.layers:
        own = layer.self_attn
        everything = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)

        def attention(h: Tensor, own: Any = own, everything: Tensor = everything) -> Tensor:
            weights, biases = own.in_proj_weight.chunk(3), own.in_proj_bias.chunk(3)
            q, k, v = (heads_of(h @ w.mT + b, own.num_heads)
                       for w, b in zip(weights, biases, strict=True))  # fmt: skip
            return own.out_proj(attend(q, k, v, everything, q.shape[-1] ** -0.5))

        def feed(h: Tensor, layer: Any = layer) -> Tensor:
            return added_mlp(layer.linear2(layer.activation(layer.linear1(h))), mlp)

        if layer.norm_first:
            x = x + attention(layer_norm(x, layer.norm1))
            x = x + feed(layer_norm(x, layer.norm2))
        else:
            x = layer_norm(x + attention(x), layer.norm1)
            x = layer_norm(x + feed(x), layer.norm2)
    return x
