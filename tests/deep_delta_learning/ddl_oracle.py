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
    time, d, n = x.shape
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
