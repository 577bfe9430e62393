"""Plain restatement of the paper's equations, written for reading: loops over tokens, no shared code with the package."""

import math

import torch


def delta(x, k, v, beta, eps):
    """Equation 2.2 for one token: x [d, n], k [d], v [n], beta number."""
    unit = k / math.sqrt(float(k @ k) + eps * eps)
    new = x.clone()
    for column in range(x.shape[1]):
        reading = float(unit @ x[:, column])
        new[:, column] = x[:, column] + float(beta) * (float(v[column]) - reading) * unit
    return new


def residual(x, h, context, x_in, *, gate_weight, gate_bias, target_weight, target_bias, target_source, scale, eps):
    """One sublayer of the released models for one token; x [d, n], the other vectors [d]."""
    beta = 2 / (1 + math.exp(-(float(gate_weight @ context) + gate_bias)))
    source = context if target_source == "context" else x_in
    v = target_weight @ source + target_bias
    if scale is not None:
        v = scale / (1 + torch.exp(-v))
    return delta(x, h, v, beta, eps)


def compress_channels(x, weight, read, causal):
    """Convolution along the value channels of one token, x [d, n], weight [d, taps], then the readout."""
    d, n = x.shape
    taps = weight.shape[1]
    left = taps - 1 if causal else (taps - 1) // 2
    result = torch.zeros(d, dtype=x.dtype)
    for feature in range(d):
        for output in range(n):
            for tap in range(taps):
                channel = output + tap - left
                if 0 <= channel < n:
                    result[feature] += read[output] * weight[feature, tap] * x[feature, channel]
    return result


def compress_tokens(x, weight, read):
    """Causal convolution over time, x [T, d, n], weight [d, n, taps] with the present token last, then the readout."""
    time, d, _ = x.shape
    taps = weight.shape[2]
    result = torch.zeros(time, d, dtype=x.dtype)
    for t in range(time):
        for back in range(taps):
            if t - back >= 0:
                result[t] += ((weight[:, :, taps - 1 - back] * x[t - back]) * read).sum(-1)
    return result


def expand(x, weight):
    """Input expansion, x [T, d], weight [d, n, taps] with the present token last."""
    time, d = x.shape
    _, n, taps = weight.shape
    result = torch.zeros(time, d, n, dtype=x.dtype)
    for t in range(time):
        for back in range(taps):
            if t - back >= 0:
                result[t] += weight[:, :, taps - 1 - back] * x[t - back][:, None]
    return result


def rms_norm(x, weight, eps=1e-5):
    return x / torch.sqrt((x * x).mean() + eps) * weight


def rotate(x, position, base=10000.0):
    """Rotary embedding of one head at one position, halves as pairs."""
    half = x.shape[0] // 2
    result = x.clone()
    for i in range(half):
        angle = position / base ** (2 * i / x.shape[0])
        result[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        result[half + i] = x[i] * math.sin(angle) + x[half + i] * math.cos(angle)
    return result


def attend(c, weights, heads):
    """Causal attention over c [T, d]: rotation, then a norm of queries and keys per head."""
    time, _ = c.shape
    q, k, v = (c @ weights[name].T for name in ("c_q", "c_k", "c_v"))
    width = q.shape[1] // heads
    out = torch.zeros_like(q)
    for head in range(heads):
        place = slice(head * width, (head + 1) * width)
        queries = torch.stack([rms_norm(rotate(q[t, place], t), weights["q_rms"]) for t in range(time)])
        keys = torch.stack([rms_norm(rotate(k[t, place], t), weights["k_rms"]) for t in range(time)])
        for t in range(time):
            scores = torch.softmax(keys[: t + 1] @ queries[t] / math.sqrt(width), 0)
            out[t, place] = scores @ v[: t + 1, place]
    return out @ weights["c_proj"].T


def language_model(state, ids, *, layers, heads, n, compressor):
    """Logits [T, V] of a released model from its own parameter names; compressor None, "channel" or "token"."""

    def weight(name):
        return state[f"{name}.weight"]

    def compressed(x, name):
        if n == 1:
            return x[..., 0]
        if compressor == "channel":
            return torch.stack([compress_channels(token, weight(name), state[f"{name}.read"], False) for token in x])
        return compress_tokens(x, weight(f"{name}.shortconv").reshape(x.shape[1], n, -1), state[f"{name}.read"])

    embed = weight("transformer.wte")
    x = embed[ids]
    d = x.shape[1]
    if "input_embed.conv.weight" in state:
        x = expand(x, weight("input_embed.conv").reshape(d, n, -1))
    else:
        x = x[..., None].repeat(1, 1, n)
    for layer in range(layers):
        place = f"transformer.h.{layer}."
        for part, norm in (("attn", "ln_1"), ("mlp", "ln_2")):
            x_in = compressed(x, place + "compress")
            c = torch.stack([rms_norm(token, weight(place + norm)) for token in x_in])
            if part == "attn":
                h = attend(
                    c,
                    {name: weight(f"{place}attn.{name}") for name in ("c_q", "c_k", "c_v", "c_proj", "q_rms", "k_rms")},
                    heads,
                )
            else:
                gate = c @ weight(place + "mlp.c_fc1").T
                h = (gate * torch.sigmoid(gate) * (c @ weight(place + "mlp.c_fc2").T)) @ weight(place + "mlp.c_proj").T
            name = f"{place}ddl_{part}."
            x = torch.stack(
                [
                    residual(
                        x[t],
                        h[t],
                        c[t],
                        x_in[t],
                        gate_weight=state[name + "beta.weight"][0],
                        gate_bias=state[name + "beta.bias"].item(),
                        target_weight=state[name + "v_proj.weight"],
                        target_bias=state[name + "v_proj.bias"],
                        target_source="state",
                        scale=4.0,
                        eps=1e-5,
                    )
                    for t in range(x.shape[0])
                ]
            )
    x = compressed(x, "readout")
    return torch.stack([rms_norm(token, weight("transformer.ln_f")) for token in x]) @ embed.T
