"""Float64 NumPy reference for every computation of the package.

It is the second opinion of the tests: it never imports the package, is written to be read against
the mathematics and not to be fast, and every gradient is derived by hand. Functions return new
arrays, the vector operations included, so that an in-place kernel is compared with a value.

Axes: B batch, T time, C model_dim, F ffn, H heads of queries, G heads of keys and values, D
head_dim, Q = H D, K = G D, V vocabulary. ``...`` stands for any leading axes. ``d_name`` is the
gradient of a scalar loss with respect to ``name``.

The parameters of a model are a dict of arrays. All biases (``b…`` and ``beta``) may be missing:

- ``embedding.weight`` [V, C], ``output.bias`` [V], and ``output.weight`` [V, C] unless it is tied
  to the embedding
- ``blocks.{i}.attention.wq`` [Q, C], ``wk``, ``wv`` [K, C], ``wo`` [C, Q], ``bq`` [Q], ``bk``,
  ``bv`` [K], ``bo`` [C], and with qk_norm ``q_gamma``, ``k_gamma`` [D]
- ``blocks.{i}.ffn.wi`` [F, C], ``bi`` [F], ``wo`` [C, F], ``bo`` [C], and with a gate ``wg`` [F, C]
  and ``bg`` [F]
- ``blocks.{i}.norm1.gamma``, ``norm1.beta``, ``norm2.gamma``, ``norm2.beta`` [C]
- ``final_norm.gamma``, ``final_norm.beta`` [C] where the configuration has a final norm
- ``blocks.{i}.attention.gamma``, ``beta`` [Q] and ``blocks.{i}.ffn.gamma``, ``beta`` [F] where it
  has norms before the layers' last matrices

The configuration is a dict with the keys ``vocab_size``, ``model_dim``, ``num_blocks``,
``num_heads``, ``activation`` (of ``ACTIVATIONS``), ``positions`` ("rope" or "none"), ``rope_base``,
``final_norm`` (bool), ``attention_window`` (0: no limit) and, where they are not False,
``sub_norm``, ``qk_norm``, ``gated``, ``tied_embeddings``, ``int8_activations``, ``int8_cache`` and
``ternary_embedding``. With the cache in int8, a token's key and value are rounded as activations
are, each head by itself. Keys with defaults: ``head_dim`` (C / H), ``norm`` ("layer" or "rms"),
``norm_epsilon``, ``windows`` (``attention_window`` of each block), and ``rope_pairs``,
``rope_fraction``, ``rope_factor``, ``rope_original_length`` (`rotary` has their meaning).
"""

import itertools
import math
import struct

import numpy as np

NORM_EPSILON = 1e-5
C_V1_MAGIC = 0x1B1B1


def _float64(array):
    return np.asarray(array, dtype=np.float64)


def bfloat16(x):
    """x rounded to bfloat16, 8 significant bits, ties to even; no subnormals."""
    mantissa, exponent = np.frexp(_float64(x))
    return np.ldexp(np.rint(mantissa * 2.0**8) / 2.0**8, exponent)


# --- Vector and matrix operations (math_ops) ------------------------------------------------------


def ternary_matrix_vector_mul(matrix, vector, scale=1.0):
    """``scale * matrix @ vector``: matrix [R, C], vector [C] -> [R]."""
    return scale * (_float64(matrix) @ _float64(vector))


def matrix_transpose_vector_mul(matrix, vector, scale=1.0):
    """``scale * matrix.T @ vector``: matrix [R, C], vector [R] -> [C]."""
    return scale * (_float64(matrix).T @ _float64(vector))


def add_vector(x, y):
    """``x + y``, both [N]."""
    return _float64(x) + _float64(y)


def add_scalar_mul_vector(x, scalar, y):
    """``x + scalar * y``, both [N]."""
    return _float64(x) + scalar * _float64(y)


def multiply_vector(x, y):
    """``x * y`` element by element, both [N]."""
    return _float64(x) * _float64(y)


def scalar_mul_vector(x, scalar):
    """``scalar * x``, [N]."""
    return scalar * _float64(x)


def vector_sub_scalar(x, scalar):
    """``x - scalar``, [N]."""
    return _float64(x) - scalar


def vector_div_scalar(x, scalar):
    """``x / scalar``, [N]."""
    return _float64(x) / scalar


def vector_pow_scalar(x, power):
    """``x ** power``, [N]; NaN for a negative base with a fractional power."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return _float64(x) ** power


def vector_sum(x):
    """The sum of x [N], correctly rounded."""
    return math.fsum(_float64(x))


def dot_product(x, y):
    """``x . y``: both [N], correctly rounded for float32 input, whose products float64 holds."""
    return math.fsum(_float64(x) * _float64(y))


def outer_product_add(matrix, x, y):
    """``matrix + x y^T``: matrix [R, C], x [R], y [C]."""
    return _float64(matrix) + np.outer(_float64(x), _float64(y))


def matmul(a, b, into=None, transpose_a=False, transpose_b=False):
    """``op(a) @ op(b)``, added to ``into`` where it is given: [M, K] x [K, N] -> [M, N].

    A transposed operand is stored with its axes swapped: a as [K, M], b as [N, K].
    """
    a, b = _float64(a), _float64(b)
    product = (a.T if transpose_a else a) @ (b.T if transpose_b else b)
    return product if into is None else _float64(into) + product


def exp(x):
    """``e ** x``, any shape."""
    return np.exp(_float64(x))


def relu(x):
    """``max(x, 0)``, any shape."""
    return np.maximum(_float64(x), 0.0)


def relu2(x):
    """``max(x, 0) ** 2``, any shape."""
    return relu(x) ** 2


def sigmoid(x):
    """``1 / (1 + exp(-x))``, any shape."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-_float64(x)))


def silu(x):
    """``x sigmoid(x)``, any shape (Elfwing et al., arXiv 1702.03118, equation 4); NaN for -inf."""
    with np.errstate(invalid="ignore"):
        return _float64(x) * sigmoid(x)


def silu_slope(x):
    """The derivative of `silu`, with 1 - sigmoid(x) = sigmoid(-x)."""
    with np.errstate(invalid="ignore"):
        return sigmoid(x) + silu(x) * sigmoid(-_float64(x))


def _gelu_argument(x):
    """u, of which ``(1 + tanh(u / 2)) / 2 = sigmoid(u)``, and its derivative."""
    x, factor = _float64(x), 2.0 * math.sqrt(2.0 / math.pi)
    with np.errstate(over="ignore"):
        return factor * (x + 0.044715 * x**3), factor * (1.0 + 3 * 0.044715 * x**2)


def gelu(x):
    """GELU with tanh, any shape: ``x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``.

    Hendrycks & Gimpel, arXiv 1606.08415, section 2. As a sigmoid it does not cancel below 0.
    """
    with np.errstate(invalid="ignore"):
        return _float64(x) * sigmoid(_gelu_argument(x)[0])


def gelu_slope(x):
    """The derivative of `gelu`."""
    u, slope = _gelu_argument(x)
    with np.errstate(invalid="ignore"):
        return sigmoid(u) + gelu(x) * sigmoid(-u) * slope


def softmax(x):
    """Softmax over the last axis, [..., N]."""
    x = _float64(x)
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def softmax_backward(d_probabilities, probabilities):
    """d_x [..., N] from the gradient of the probabilities and the probabilities themselves."""
    inner = (d_probabilities * probabilities).sum(axis=-1, keepdims=True)
    return probabilities * (d_probabilities - inner)


def layer_norm_forward(x, gamma, beta, epsilon=NORM_EPSILON):
    """Layer norm over the last axis with the biased variance.

    Returns
    -------
    output : float64[..., C]
    mean, inv_std : float64[...]
    """
    x = _float64(x)
    mean = x.mean(axis=-1)
    centred = x - mean[..., None]
    inv_std = 1.0 / np.sqrt((centred**2).mean(axis=-1) + epsilon)
    return gamma * (centred * inv_std[..., None]) + beta, mean, inv_std


def layer_norm(x, gamma, beta, epsilon=NORM_EPSILON):
    """The output [..., C] of `layer_norm_forward` alone."""
    return layer_norm_forward(x, gamma, beta, epsilon)[0]


def layer_norm_backward(d_output, x, gamma, epsilon=NORM_EPSILON):
    """Backward of `layer_norm`.

    With n = (x - mean) * inv_std and g = gamma * d_output, the mean and the variance each take a
    share of every element's gradient away: d_x = inv_std * (g - mean(g) - n * mean(g * n)).

    Returns
    -------
    d_x : float64[..., C]
    d_gamma, d_beta : float64[C], summed over the leading axes
    """
    x = _float64(x)
    _, mean, inv_std = layer_norm_forward(x, 1.0, 0.0, epsilon)
    normalised = (x - mean[..., None]) * inv_std[..., None]
    g = gamma * d_output
    d_x = inv_std[..., None] * (
        g
        - g.mean(axis=-1, keepdims=True)
        - normalised * (g * normalised).mean(axis=-1, keepdims=True)
    )
    return d_x, _sum_rows(d_output * normalised), _sum_rows(d_output)


def rms_norm(x, gamma, epsilon=NORM_EPSILON):
    """RMS norm over the last axis: no mean is taken away, and nothing added; [..., C].

    Zhang & Sennrich, arXiv 1910.07467, equation 4.
    """
    x = _float64(x)
    return gamma * (x * _inverse_rms(x, epsilon))


def _inverse_rms(x, epsilon):
    return 1.0 / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon)


def rms_norm_backward(d_output, x, gamma, epsilon=NORM_EPSILON):
    """Backward of `rms_norm`: d_x [..., C] and d_gamma [C], summed over the leading axes.

    With n = x r, r = 1 / sqrt(mean(x^2) + epsilon), and g = gamma * d_output, it is
    d_x = r (g - n mean(g * n)).
    """
    x = _float64(x)
    inverse = _inverse_rms(x, epsilon)
    normalised, g = x * inverse, gamma * d_output
    d_x = inverse * (g - normalised * (g * normalised).mean(axis=-1, keepdims=True))
    return d_x, _sum_rows(d_output * normalised)


def activation_step(x):
    """What the rows of x [..., N] are multiples of after `quantize_activations`: [..., 1]."""
    return np.abs(_float64(x)).max(axis=-1, keepdims=True) / 127.0


def quantize_activations(x):
    """x [..., N] as int8 with a step for each row: the nearest multiples of max |x| / 127.

    BitNet b1.58, arXiv 2402.17764, section 2; ties go to the even multiple, and zeros stay.
    """
    step = activation_step(x)
    return step * np.rint(_float64(x) / np.where(step > 0.0, step, 1.0))


def round_to_int8(x):
    """The codes int64[..., N], -127 to 127, and the steps float64[..., 1] of the rows of x.

    Their product is `quantize_activations` of x.
    """
    step = activation_step(x)
    return np.rint(_float64(x) / np.where(step > 0.0, step, 1.0)).astype(np.int64), step


def packed_product(codes, scales, group, x, bias=0.0):
    """Codes [R, C] times scales [1, 1] or [R, G], times x [B, C] rounded to int8: [B, R].

    ``group`` neighbours share a scale. The sums are whole numbers, and only what they are
    multiplied by is not.
    """
    codes, (rounded, step) = np.asarray(codes, np.int64), round_to_int8(x)
    total = np.zeros((len(rounded), len(codes)))
    for i in range(scales.shape[1]):
        part = np.s_[:, i * group : (i + 1) * group]
        total += rounded[part] @ codes[part].T * _float64(scales)[:, i]
    return total * step + bias


def _rows(x):
    """x [..., N] as a matrix of rows [rows, N]."""
    return x.reshape(-1, x.shape[-1])


def _sum_rows(x):
    return _rows(x).sum(axis=0)


# --- Layers, each a forward and its backward ------------------------------------------------------


def linear(x, weight, bias):
    """``x W^T + b``: x [..., I], weight [O, I], bias [O] -> [..., O]."""
    return x @ weight.T + bias


def linear_backward(d_output, x, weight):
    """Backward of `linear`: d_x [..., I], d_weight [O, I], d_bias [O]."""
    return d_output @ weight, _rows(d_output).T @ _rows(x), _sum_rows(d_output)


# The feed forward's activations, each with its derivative.
ACTIVATIONS = {
    "relu2": (relu2, lambda x: 2.0 * relu(x)),
    "relu": (relu, lambda x: (x > 0).astype(np.float64)),
    "silu": (silu, silu_slope),
    "gelu": (gelu, gelu_slope),
}


def activate(x, activation):
    """The feed forward's activation, any shape."""
    return ACTIVATIONS[activation][0](x)


def activate_backward(d_output, x, activation):
    """Backward of `activate`; the gradient of relu at 0 is 0."""
    return d_output * ACTIVATIONS[activation][1](x)


def _rounded(x, config):
    """What a layer's matrix makes of its input x [..., N].

    The gradient goes straight through: the one of the result counts as that of x (Bengio et al.,
    arXiv 1308.3432).
    """
    return quantize_activations(x) if config.get("int8_activations") else x


def _norm(x, weights, prefix, config):
    """The model's kind of norm, with the gamma and, if there is one, the beta under a prefix."""
    gamma, epsilon = weights[prefix + "gamma"], config.get("norm_epsilon", NORM_EPSILON)
    if config.get("norm") == "rms":
        return rms_norm(x, gamma, epsilon)
    return layer_norm(x, gamma, weights.get(prefix + "beta", 0.0), epsilon)


def _norm_backward(d_output, x, weights, prefix, config, gradients):
    """d_x; the gradients of gamma and beta go into ``gradients``."""
    gamma, epsilon = weights[prefix + "gamma"], config.get("norm_epsilon", NORM_EPSILON)
    if config.get("norm") == "rms":
        d_x, gradients[prefix + "gamma"] = rms_norm_backward(d_output, x, gamma, epsilon)
        return d_x
    d_x, gradients[prefix + "gamma"], d_beta = layer_norm_backward(d_output, x, gamma, epsilon)
    if prefix + "beta" in weights:
        gradients[prefix + "beta"] = d_beta
    return d_x


def _linear(x, weights, name):
    """`linear` of the matrix ``w{name}`` and, if there is one, the bias ``b{name}``."""
    return linear(x, weights["w" + name], weights.get("b" + name, 0.0))


def _linear_backward(d_output, x, weights, name, gradients):
    """d_x; the gradients of matrix and bias go into ``gradients``."""
    d_x, gradients["w" + name], d_bias = linear_backward(d_output, x, weights["w" + name])
    if "b" + name in weights:
        gradients["b" + name] = d_bias
    return d_x


def _before_wo(x, weights, config):
    """What a layer's last matrix gets for x [..., N]: normed and rounded as configured."""
    if config.get("sub_norm"):
        x = _norm(x, weights, "", config)
    return _rounded(x, config)


def _before_wo_backward(d_output, x, weights, config, gradients):
    """d_x; the gradients of gamma and beta go into ``gradients``."""
    if config.get("sub_norm"):
        d_output = _norm_backward(d_output, x, weights, "", config, gradients)
    return d_output


def embedding(tokens, weight):
    """Rows of weight [V, C] for tokens [B, T] -> [B, T, C]; the padding id V gives zeros."""
    padding_row = np.zeros((1, weight.shape[1]))
    return np.concatenate([weight, padding_row])[tokens]


def embedding_backward(d_output, tokens, vocab_size):
    """d_weight [V, C]: each token's row collects the gradients of all its positions."""
    d_weight = np.zeros((vocab_size + 1, d_output.shape[-1]))
    for token, d_row in zip(tokens.reshape(-1), _rows(d_output), strict=True):
        d_weight[token] += d_row
    return d_weight[:vocab_size]


def rotary_frequencies(dim, base=10000.0, factor=1.0, original_length=0):
    """By how much the pairs of ``dim`` elements turn from one position to the next: [dim / 2].

    Pair i turns by base^(-2 i / dim) (Su et al., arXiv 2104.09864, section 3.2.2). With a factor
    above 1 it is YaRN's: of a pair that turns less than once in the original length, divided by
    the factor; of one that turns more than 32 times, as it was; in between, on the line between
    the two by the number of the pair, whose ends are whole numbers (Peng et al., arXiv 2309.00071,
    section 3.2).
    """
    pair = np.arange(dim // 2)
    frequencies = base ** (-2.0 * pair / dim)
    if factor == 1.0:
        return frequencies

    def pair_that_turns(times):
        return dim * math.log(original_length / (2.0 * math.pi * times)) / (2.0 * math.log(base))

    first = max(math.floor(pair_that_turns(32.0)), 0)
    last = min(math.ceil(pair_that_turns(1.0)), dim - 1)
    slow = np.clip((pair - first) / max(last - first, 1e-3), 0.0, 1.0)
    return frequencies * (slow / factor + 1.0 - slow)


def _rotate(x, direction, base, pairs, fraction, factor, original_length):
    x = _float64(x)
    dim = round(x.shape[3] * fraction)
    # Angles [T, 1, dim / 2], ready to meet [B, T, H, dim / 2].
    angles = np.arange(x.shape[1])[:, None, None] * rotary_frequencies(
        dim, base, factor, original_length
    )
    # Pairs are complex numbers.
    first, second = {
        "halves": (np.s_[..., : dim // 2], np.s_[..., dim // 2 : dim]),
        "adjacent": (np.s_[..., 0:dim:2], np.s_[..., 1:dim:2]),
    }[pairs]
    length = 1.0 + 0.1 * math.log(factor)
    turned = (x[first] + 1j * x[second]) * (length * np.exp(1j * direction * angles))
    output = x.copy()
    output[first], output[second] = turned.real, turned.imag
    return output


def rotary(x, base=10000.0, pairs="halves", fraction=1.0, factor=1.0, original_length=0):
    """Rotary positions, x [B, T, H, D].

    The first ``fraction`` of a head turns, an even number of elements: i with i + half of them for
    "halves", 2 i with 2 i + 1 for "adjacent". With a factor above 1, YaRN's ``original_length``
    decides on the frequencies, and what turns grows by 1 + 0.1 ln(factor).
    """
    return _rotate(x, 1.0, base, pairs, fraction, factor, original_length)


def rotary_backward(
    d_output, base=10000.0, pairs="halves", fraction=1.0, factor=1.0, original_length=0
):
    """d_x [B, T, H, D]: the transpose of a rotation is the rotation back."""
    return _rotate(d_output, -1.0, base, pairs, fraction, factor, original_length)


def _rope_settings(config):
    names = ("base", "pairs", "fraction", "factor", "original_length")
    return {name: config["rope_" + name] for name in names if "rope_" + name in config}


def allowed_keys(tokens, vocab_size, span, starts=None):
    """bool [B, T, T]: may query i look at key j?

    Not later, not padding, not span or more back, and not before ``starts[b, i]``, where its
    document begins.
    """
    time = tokens.shape[1]
    query, key = np.arange(time)[:, None], np.arange(time)[None, :]
    in_reach = key <= query
    if span:
        in_reach &= key > query - span
    if starts is not None:
        in_reach = in_reach & (key >= np.asarray(starts)[:, :, None])
    return in_reach & (tokens != vocab_size)[:, None, :]


def masked_softmax(scores, allowed):
    """Softmax over the allowed entries of the last axis; zeros where none is allowed."""
    masked = np.where(allowed, scores, -np.inf)
    peak = masked.max(axis=-1, keepdims=True)
    exponentials = np.exp(masked - np.where(np.isfinite(peak), peak, 0.0))
    total = exponentials.sum(axis=-1, keepdims=True)
    return exponentials / np.where(total == 0.0, 1.0, total)


def _project_heads(x, weights, config, name):
    """q, k or v as the matrix makes it: [B, T, C] -> [B, T, heads, D], the heads one by one."""
    head_dim = config.get("head_dim", config["model_dim"] // config["num_heads"])
    return _linear(x, weights, name).reshape(*x.shape[:2], -1, head_dim)


def _place(projected, weights, config, name):
    """q or k with its norm and its position, all [B, T, heads, D]."""
    if config.get("qk_norm"):
        epsilon = config.get("norm_epsilon", NORM_EPSILON)
        projected = rms_norm(projected, weights[name + "_gamma"], epsilon)
    if config["positions"] == "rope":
        projected = rotary(projected, **_rope_settings(config))
    return projected


def _place_backward(d_output, projected, weights, config, name, gradients):
    """The gradient of the projected q or k; that of gamma goes into ``gradients``."""
    if config["positions"] == "rope":
        d_output = rotary_backward(d_output, **_rope_settings(config))
    if config.get("qk_norm"):
        gamma = name + "_gamma"
        epsilon = config.get("norm_epsilon", NORM_EPSILON)
        d_output, gradients[gamma] = rms_norm_backward(d_output, projected, weights[gamma], epsilon)
    return d_output


def _share(x, config):
    """Keys or values [B, T, G, D] for each head of queries [B, T, H, D]: H / G in a row share."""
    return np.repeat(x, config["num_heads"] // x.shape[2], axis=2)


def _share_backward(d_output, like):
    """The sum over the heads that share: [B, T, H, D] -> [B, T, G, D]."""
    batch, time, shared, head_dim = like.shape
    return d_output.reshape(batch, time, shared, -1, head_dim).sum(axis=3)


def nearest_int16(x):
    """A number of levels to the nearest whole one, of at most 16 bits."""
    return np.rint(x)


def _rounded_to(x, levels):
    """x to whole multiples of the largest |x| of each row over ``levels``."""
    step = np.abs(x).max(axis=-1, keepdims=True) / levels
    step[step == 0.0] = 1.0
    return nearest_int16(x / step) * step


def _weights_of_codes(weights):
    """The weights [B, H, T, T] of codes of values, rounded: the largest of a row becomes 32767, or
    less where all of them would exceed 8450000."""
    top, total = weights.max(axis=-1, keepdims=True), weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.minimum(32767.0 / top, 8450000.0 / total)
        return np.where(top > 0.0, nearest_int16(weights * inverse) / inverse, 0.0)


def _attend(x, tokens, weights, config, starts=None):
    """The intermediate values of attention: q [B, T, H, D], k, v [B, T, G, D], probabilities
    [B, H, T, T] and the concatenated heads [B, T, Q]."""
    q, k, v = (_project_heads(x, weights, config, name) for name in "qkv")
    q, k = _place(q, weights, config, "q"), _place(k, weights, config, "k")
    if config.get("int8_cache"):
        q = _rounded_to(q, min(32767, 16900000 // q.shape[-1]))
        k, v = quantize_activations(k), quantize_activations(v)
    allowed = allowed_keys(tokens, config["vocab_size"], config["attention_window"], starts)
    scores = np.einsum("bihd,bjhd->bhij", q, _share(k, config)) / math.sqrt(q.shape[-1])
    probabilities = masked_softmax(scores, allowed[:, None])
    if config.get("int8_cache"):
        steps = np.abs(_share(v, config)).max(axis=-1).transpose(0, 2, 1)[:, :, None] / 127.0
        probabilities = _weights_of_codes(probabilities * steps) / np.where(steps, steps, 1.0)
    heads = np.einsum("bhij,bjhd->bihd", probabilities, _share(v, config))
    return q, k, v, probabilities, heads.reshape(*x.shape[:2], -1)


def attention(x, tokens, weights, config, starts=None):
    """Causal attention: x [B, T, C], tokens [B, T] -> [B, T, C].

    ``weights`` holds ``wq``, ``bq`` ... ``wo``, ``bo``, with sub_norm ``gamma`` and ``beta``, and
    with qk_norm ``q_gamma`` and ``k_gamma``. The tokens say which keys are padding, and ``starts``
    [B, T] where each query's first key is. Fewer heads of keys and values than of queries are
    grouped-query attention (Ainslie et al., arXiv 2305.13245, section 2.2); the norm of queries and
    keys is that of Dehghani et al., arXiv 2302.05442, section 2, with RMS.
    """
    heads = _attend(_rounded(x, config), tokens, weights, config, starts)[-1]
    return _linear(_before_wo(heads, weights, config), weights, "o")


def attention_backward(d_output, x, tokens, weights, config, starts=None):
    """Backward of `attention`: d_x [B, T, C] and a dict of gradients named like ``weights``."""
    x = _rounded(x, config)
    q, k, v, probabilities, heads = _attend(x, tokens, weights, config, starts)
    gradients = {}
    d_heads = _linear_backward(
        d_output, _before_wo(heads, weights, config), weights, "o", gradients
    )
    d_heads = _before_wo_backward(d_heads, heads, weights, config, gradients)
    d_heads = d_heads.reshape(q.shape)

    d_probabilities = np.einsum("bihd,bjhd->bhij", d_heads, _share(v, config))
    # A forbidden key has probability 0, so its score's gradient comes out as 0 by itself.
    d_scores = softmax_backward(d_probabilities, probabilities) / math.sqrt(q.shape[-1])
    d_v = _share_backward(np.einsum("bhij,bihd->bjhd", probabilities, d_heads), v)
    d_q = np.einsum("bhij,bjhd->bihd", d_scores, _share(k, config))
    d_k = _share_backward(np.einsum("bhij,bihd->bjhd", d_scores, q), k)

    d_x = np.zeros_like(x)
    for name, d_placed in (("q", d_q), ("k", d_k), ("v", d_v)):
        if name != "v":
            projected = _project_heads(x, weights, config, name)
            d_placed = _place_backward(d_placed, projected, weights, config, name, gradients)
        d_projected = d_placed.reshape(*x.shape[:2], -1)
        d_x += _linear_backward(d_projected, x, weights, name, gradients)
    return d_x, gradients


def _feed_forward_values(x, weights, config):
    """What Wi and, with a gate, Wg give (else None), and the hidden values: [B, T, F] each."""
    inner, gate = _linear(x, weights, "i"), None
    if not config.get("gated"):
        return inner, gate, activate(inner, config["activation"])
    gate = _linear(x, weights, "g")
    return inner, gate, activate(gate, config["activation"]) * inner


def feed_forward(x, weights, config):
    """``Wo norm(hidden) + bo``, the norm with sub_norm: x [B, T, C] -> [B, T, C].

    hidden is ``act(Wi x + bi)``, or with a gate ``act(Wg x + bg) * (Wi x + bi)`` (Shazeer,
    arXiv 2002.05202, equation 5).
    """
    hidden = _feed_forward_values(_rounded(x, config), weights, config)[-1]
    return _linear(_before_wo(hidden, weights, config), weights, "o")


def feed_forward_backward(d_output, x, weights, config):
    """Backward of `feed_forward`: d_x [B, T, C] and a dict of gradients named like ``weights``."""
    x = _rounded(x, config)
    inner, gate, hidden = _feed_forward_values(x, weights, config)
    gradients = {}
    d_hidden = _linear_backward(
        d_output, _before_wo(hidden, weights, config), weights, "o", gradients
    )
    d_hidden = _before_wo_backward(d_hidden, hidden, weights, config, gradients)
    if gate is None:
        d_inner = activate_backward(d_hidden, inner, config["activation"])
        return _linear_backward(d_inner, x, weights, "i", gradients), gradients
    d_gate = activate_backward(d_hidden * inner, gate, config["activation"])
    d_inner = d_hidden * activate(gate, config["activation"])
    d_x = _linear_backward(d_gate, x, weights, "g", gradients)
    return d_x + _linear_backward(d_inner, x, weights, "i", gradients), gradients


def _part(params, prefix):
    """The entries under a prefix, with the prefix taken off."""
    return {
        name.removeprefix(prefix): value
        for name, value in params.items()
        if name.startswith(prefix)
    }


def block(x, tokens, weights, config, starts=None):
    """One transformer block, pre-norm: x [B, T, C] -> [B, T, C]."""
    normalised = _norm(x, weights, "norm1.", config)
    x = x + attention(normalised, tokens, _part(weights, "attention."), config, starts)
    return x + feed_forward(_norm(x, weights, "norm2.", config), _part(weights, "ffn."), config)


def block_backward(d_output, x, tokens, weights, config, starts=None):
    """Backward of `block`: d_x [B, T, C] and a dict of gradients named like ``weights``."""
    attention_weights, ffn_weights = _part(weights, "attention."), _part(weights, "ffn.")
    normalised1 = _norm(x, weights, "norm1.", config)
    middle = x + attention(normalised1, tokens, attention_weights, config, starts)
    normalised2 = _norm(middle, weights, "norm2.", config)

    gradients = {}
    d_normalised2, d_ffn = feed_forward_backward(d_output, normalised2, ffn_weights, config)
    d_middle = d_output + _norm_backward(
        d_normalised2, middle, weights, "norm2.", config, gradients
    )
    d_normalised1, d_attention = attention_backward(
        d_middle, normalised1, tokens, attention_weights, config, starts
    )
    d_x = d_middle + _norm_backward(d_normalised1, x, weights, "norm1.", config, gradients)
    gradients.update({"attention." + name: value for name, value in d_attention.items()})
    gradients.update({"ffn." + name: value for name, value in d_ffn.items()})
    return d_x, gradients


def counted_positions(tokens, targets, vocab_size):
    """bool [B, T]: the positions the loss counts, where neither token nor target is padding."""
    return (tokens != vocab_size) & (targets != vocab_size)


def cross_entropy(logits, targets, counted):
    """Mean of -log p[target] in nats over the counted positions; 0 where there is none.

    logits [B, T, V], targets [B, T], counted bool [B, T].
    """
    rows, chosen = logits[counted], targets[counted]
    if len(rows) == 0:
        return 0.0
    peak = rows.max(axis=-1)
    log_total = peak + np.log(np.exp(rows - peak[:, None]).sum(axis=-1))
    return float(np.mean(log_total - rows[np.arange(len(rows)), chosen]))


def cross_entropy_backward(logits, targets, counted):
    """d_logits [B, T, V]: (softmax - one-hot) / count where counted, else 0."""
    d_logits = np.zeros_like(logits)
    count = int(counted.sum())
    if count:
        d_rows = softmax(logits[counted])
        d_rows[np.arange(count), targets[counted]] -= 1.0
        d_logits[counted] = d_rows / count
    return d_logits


def distillation(logits, targets, counted, teacher, weight, temperature):
    """Mean of (1 - w) CE + w T^2 KL(teacher || student), both softened by T, where counted.

    Hinton, Vinyals & Dean, arXiv 1503.02531, section 2. teacher [B, T, V] are another model's
    logits.
    """
    goal, own = (softmax(_float64(each)[counted] / temperature) for each in (teacher, logits))
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(goal == 0.0, 0.0, goal * (np.log(goal) - np.log(own)))
    divergence = terms.sum(axis=-1).mean() if counted.any() else 0.0
    of_text = cross_entropy(logits, targets, counted)
    return (1.0 - weight) * of_text + weight * temperature**2 * divergence


def distillation_backward(logits, targets, counted, teacher, weight, temperature):
    """d_logits [B, T, V] of ``distillation``; 0 where not counted."""
    goal, own = (softmax(_float64(each)[counted] / temperature) for each in (teacher, logits))
    d_logits = (1.0 - weight) * cross_entropy_backward(logits, targets, counted)
    d_logits[counted] += weight * temperature * (own - goal) / max(counted.sum(), 1)
    return d_logits


# --- The whole model ------------------------------------------------------------------------------


def _hidden_states(params, config, tokens, starts):
    """The input of every block and, last, the output of the last one: [B, T, C] each."""
    states = [embedding(tokens, params["embedding.weight"])]
    for i in range(config["num_blocks"]):
        weights = _part(params, f"blocks.{i}.")
        states.append(block(states[-1], tokens, weights, _of_block(config, i), starts))
    return states


def _of_block(config, i):
    """The configuration with the window of block i."""
    return {**config, "attention_window": config["windows"][i]} if "windows" in config else config


def _output_weight(params, config):
    return params["embedding.weight" if config.get("tied_embeddings") else "output.weight"]


def _head(params, config, x):
    """What the output matrix gets for the last state, and the logits.

    It is normed where configured, and rounded where that matrix is one of few levels.
    """
    if config["final_norm"]:
        x = _norm(x, params, "final_norm.", config)
    if config.get("ternary_embedding"):
        x = _rounded(x, config)
    return x, linear(x, _output_weight(params, config), params.get("output.bias", 0.0))


def forward(params, config, tokens, starts=None):
    """The whole model.

    Parameters
    ----------
    params, config : dict
        See the module's docstring.
    tokens : int[B, T]
        Ids in [0, V), or V for padding.
    starts : int[B, T], optional
        The first position of its row that each position may see.

    Returns
    -------
    logits, probabilities : float64[B, T, V]
    """
    params = {name: _float64(value) for name, value in params.items()}
    tokens = np.asarray(tokens)
    _, logits = _head(params, config, _hidden_states(params, config, tokens, starts)[-1])
    return logits, softmax(logits)


def decode(params, config, tokens):
    """What a decoder answers: the logits after each of the tokens [T], float64[T, V].

    A matrix of few levels gets its input as int8, however it was trained, and one of floats gets
    it as it is. Of each token and head the cache keeps key and value as int8, which meet queries
    and weights of values in int16.
    """
    packed = config["scheme"] != "float"
    settings = {**config, "int8_activations": packed, "int8_cache": True}
    return forward(params, settings, np.asarray(tokens)[None])[0][0]


def loss_and_gradients(params, config, tokens, targets, starts=None, teacher=None):
    """Mean cross entropy and its gradient for every parameter.

    With a teacher the gradient is that of ``distillation``.

    Parameters
    ----------
    params, config : dict
        See the module's docstring.
    tokens, targets : int[B, T]
        Ids in [0, V), or V for padding.
    starts : int[B, T], optional
        The first position of its row that each position may see.
    teacher : (float64[B, T, V], float, float), optional
        The teacher's logits, the weight of its term, and the temperature.

    Returns
    -------
    loss : float
    gradients : dict
        float64 arrays with the names and shapes of ``params``.
    """
    params = {name: _float64(value) for name, value in params.items()}
    tokens, targets = np.asarray(tokens), np.asarray(targets)
    states = _hidden_states(params, config, tokens, starts)
    x, logits = _head(params, config, states[-1])
    counted = counted_positions(tokens, targets, config["vocab_size"])
    loss = cross_entropy(logits, targets, counted)

    gradients = {}
    if teacher is None:
        d_logits = cross_entropy_backward(logits, targets, counted)
    else:
        d_logits = distillation_backward(logits, targets, counted, *teacher)
    d_x, d_output_weight, d_bias = linear_backward(d_logits, x, _output_weight(params, config))
    if "output.bias" in params:
        gradients["output.bias"] = d_bias
    if config["final_norm"]:
        d_x = _norm_backward(d_x, states[-1], params, "final_norm.", config, gradients)
    for i in reversed(range(config["num_blocks"])):
        prefix = f"blocks.{i}."
        weights = _part(params, prefix)
        d_x, d_block = block_backward(d_x, states[i], tokens, weights, _of_block(config, i), starts)
        gradients.update({prefix + name: value for name, value in d_block.items()})
    gradients["embedding.weight"] = embedding_backward(d_x, tokens, config["vocab_size"])
    if config.get("tied_embeddings"):
        gradients["embedding.weight"] += d_output_weight
    else:
        gradients["output.weight"] = d_output_weight
    return loss, gradients


# --- Optimizer ------------------------------------------------------------------------------------


def adamw_step(weight, gradient, m, v, step, *, learning_rate, beta1, beta2, epsilon, weight_decay):
    """One step of AdamW (Loshchilov & Hutter 2019), the decay multiplied by the rate as well.

    ``step`` counts from 1. Returns the new weight, m and v.
    """
    weight, gradient, m, v = (_float64(array) for array in (weight, gradient, m, v))
    m = beta1 * m + (1.0 - beta1) * gradient
    v = beta2 * v + (1.0 - beta2) * gradient**2
    m_hat = m / (1.0 - beta1**step)
    v_hat = v / (1.0 - beta2**step)
    update = m_hat / (np.sqrt(v_hat) + epsilon) + weight_decay * weight
    return weight - learning_rate * update, m, v


def sgd_step(weight, gradient, momentum, *, learning_rate, mu, weight_decay):
    """One step of SGD with momentum (Sutskever et al. 2013), the decay multiplied by the rate.

    Returns the new weight and momentum.
    """
    weight, momentum = _float64(weight), mu * _float64(momentum) + _float64(gradient)
    return weight - learning_rate * (weight_decay * weight + momentum), momentum


def eight_bit_values(signed):
    """The 256 values of moments in eight bits, by code (Dettmers et al., arXiv 2110.02861, 1.3).

    Seven decades below 1, each of twice as many equal steps as the one below it; a value is the
    middle of a step. Besides 0 and 1. Rounded to float32 once.
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        steps = 2**exponent if signed else 2 ** (exponent + 1)
        for i in range(steps):
            middle = 0.1 + 0.9 * (i + 0.5) / steps
            values += [middle * 10.0 ** (exponent - 6)]
            values += [-values[-1]] if signed else []
    return np.sort(np.array(values).astype(np.float32))


def to_eight_bits(x, starts, signed):
    """Codes uint8[N], and scales float32[K], of moments float32[N] in blocks of 256.

    Every parameter begins with a block, at one of ``starts``. A code is that of the nearest value,
    times the largest magnitude of its block; of two, the smaller magnitude. Without signs a number
    above 0 has no code of 0.
    """
    values = _float64(eight_bit_values(signed))
    zero = int(np.flatnonzero(values == 0.0)[0])
    codes, scales = np.full(x.size, zero, np.uint8), []
    for first, stop in itertools.pairwise([*starts, x.size]):
        for begin in range(first, stop, 256):
            block = x[begin : min(begin + 256, stop)]
            scales.append(np.abs(block).max())
            if scales[-1] == 0.0:
                continue
            ratios = np.abs(block) / scales[-1]
            upper = values[zero:]
            place = np.argmin(np.abs(_float64(ratios)[:, None] - upper), axis=1)
            if signed:
                # There is no -1.
                place = np.where(block < 0, np.minimum(place, len(upper) - 2), place)
                place = np.where(block < 0, -place, place)
            else:
                place = np.where((ratios > 0) & (place == 0), 1, place)
            codes[begin : begin + block.size] = zero + place
    return codes, np.array(scales, np.float32)


def from_eight_bits(codes, scales, starts, signed):
    """The moments that codes stand for, float32[N]."""
    values, result, scales = eight_bit_values(signed), [], iter(scales)
    for first, stop in itertools.pairwise([*starts, codes.size]):
        for begin in range(first, stop, 256):
            result.append(values[codes[begin : min(begin + 256, stop)]] * next(scales))
    return np.concatenate(result)


def sign_step(weight, gradient, direction="descend"):
    """The C original's rule, the other way round: where it is not 0, minus the gradient's sign.

    With "ascend" it is C's own, departure 1.
    """
    turned = gradient if direction == "ascend" else np.negative(gradient)
    return fault1_weight_update(_float64(weight), turned)


def learning_rate(
    step,
    *,
    peak,
    warmup_steps,
    total_steps,
    falling_steps,
    schedule="cosine",
    final_fraction=0.0,
    factor=0.5,
    stair=100,
):
    """Learning rate at ``step``, counted from 0.

    It rises by equal steps, reaches the peak at the last warm-up step and stays there until the
    last ``falling_steps`` of the ``total_steps``, or what the warm-up leaves of them. Then it
    follows half a "cosine" or a "linear" way down to ``final_fraction * peak``, where it stays; or
    falls, with "step", by ``factor`` after every ``stair`` steps; or stays, with "constant".
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    falling_steps = min(falling_steps, total_steps - warmup_steps)
    gone = step - total_steps + falling_steps
    if gone < 0 or schedule == "constant":
        return peak
    if schedule == "step":
        return peak * math.prod([factor] * len(range(stair, gone + 1, stair)))
    progress = gone / falling_steps if gone < falling_steps else 1.0
    left = {"cosine": math.cos(math.pi * progress / 2.0) ** 2, "linear": 1.0 - progress}[schedule]
    return peak * (final_fraction + (1.0 - final_fraction) * left)


# --- Quantized weights ----------------------------------------------------------------------------

# The codes of each scheme.
CODES = {
    "ternary": (-1, 0, 1),
    "ternary-median": (-1, 0, 1),
    "binary": (-1, 1),
    "2bit": (-3, -1, 1, 3),
    "sign": (-1, 0, 1),
}
FLOAT16_LARGEST = 65504.0


def to_float16(x):
    """The nearest finite float16 to each number, as float64."""
    return np.minimum(_float64(x), FLOAT16_LARGEST).astype(np.float16).astype(np.float64)


def groups(weight, scale, shards=1):
    """The weights that share a scale, as a list of rows of lists: a matrix [R, C] is [R][G].

    Row r of R belongs to shard r * shards // R. The rows of several shards have one list each, that
    of their shard's weights.
    """
    if scale in ("tensor", "one") and shards == 1:
        return [[weight.reshape(-1)]]
    if scale == "tensor":
        shard_of = [row * shards // len(weight) for row in range(len(weight))]
        return [[weight[np.array(shard_of) == shard].reshape(-1)] for shard in shard_of]
    size = weight.shape[1] if scale == "row" else int(scale)
    return [[row[i : i + size] for i in range(0, row.size, size)] for row in weight]


def scales_before_rounding(weight, scheme, scale, shards=1):
    """float64[1, 1] or float64[R, G]: what each group of a weight matrix [R, C] asks for.

    mean |w| (BitNet b1.58, arXiv 2402.17764, equation 3; XNOR-Net, arXiv 1603.05279, equation 6),
    median |w| (BitNet b1.58 Reloaded, arXiv 2407.09527) or, for two bits, half the step of the best
    uniform quantizer of normal numbers (Max 1960), 5 / 8 mean |w|.
    """
    of_group = {
        "ternary": lambda w: math.fsum(w) / w.size,
        "ternary-median": np.median,
        "binary": lambda w: math.fsum(w) / w.size,
        "2bit": lambda w: 5.0 * math.fsum(w) / (8.0 * w.size),
    }[scheme]
    magnitudes = groups(np.abs(_float64(weight)), scale, shards)
    return np.array([[float(of_group(group)) for group in row] for row in magnitudes])


def first_scale(name, num_blocks):
    """The scale that the matrices of the scheme "sign" keep: the mean |w| they begin with.

    That is of normal numbers of standard deviation 0.02, divided by sqrt(2 num_blocks) where they
    write into the residual stream.
    """
    deviation = 0.02 / math.sqrt(2 * num_blocks) if name.endswith(".wo") else 0.02
    return float(to_float16(deviation * math.sqrt(2.0 / math.pi)))


def codes_of(weight, scales, scheme, scale):
    """int8[R, C]: for each weight the code of its sign that, times its scale, is nearest to it.

    Of two as near it is the smaller one, and 0 counts as positive. A scale of 0 leaves the smallest
    codes, and the scheme "sign" has no use for scales.
    """
    weight = _float64(weight)
    if scheme == "sign":
        return np.sign(weight).astype(np.int8)
    magnitudes = np.array([code for code in CODES[scheme] if code >= 0])
    size = weight.shape[1] if scale in ("tensor", "row", "one") else int(scale)
    wide = np.repeat(_float64(scales), size, axis=1)[:, : weight.shape[1]]
    ratio = np.where(wide == 0.0, 0.0, np.abs(weight) / np.where(wide == 0.0, 1.0, wide))
    # Beyond the largest code the distance from it would be rounded away.
    distances = np.abs(np.minimum(ratio, 4.0)[..., None] - magnitudes)
    nearest = magnitudes[distances.argmin(axis=-1)]
    return np.where(weight < 0.0, -nearest, nearest).astype(np.int8)


def quantize(weight, scheme="ternary", scale="tensor", fixed=None, shards=1):
    """Codes int8[R, C] and scales float64[1, 1] or [R, G] of a weight matrix [R, C].

    The scales are rounded to float16, or are 1 (``scale`` "one", as in the C original), or are
    ``fixed``. The effective weight is the code times its scale.
    """
    if scale == "one" or fixed is not None:
        of_rows = groups(weight, scale, shards)
        shape = [len(of_rows), len(of_rows[0])]
        scales = np.full(shape, 1.0 if scale == "one" else fixed)
    else:
        scales = to_float16(scales_before_rounding(weight, scheme, scale, shards))
    return codes_of(weight, scales, scheme, scale), scales


# Bits a code takes in a file, where it is its place among the sorted codes.
BITS = {"ternary": 2, "ternary-median": 2, "binary": 1, "2bit": 2, "sign": 2}


def pack(codes, scheme):
    """Codes int8[R, C] as uint8[R, ceil(C bits / 8)]: each row is one little-endian number.

    The first column is its lowest digit; what is left over of the last byte is 0.
    """
    places, bits = CODES[scheme], BITS[scheme]
    size = -(-codes.shape[1] * bits // 8)
    packed = bytearray()
    for row in codes.tolist():
        number = sum(places.index(code) << bits * column for column, code in enumerate(row))
        packed += number.to_bytes(size, "little")
    return np.frombuffer(packed, np.uint8).reshape(len(codes), size)


def unpack(packed, scheme, columns):
    """The inverse of `pack`: uint8[R, ceil(C bits / 8)] -> int8[R, C]."""
    places, bits = CODES[scheme], BITS[scheme]
    numbers = [int.from_bytes(row.tobytes(), "little") for row in packed]
    return np.array(
        [[places[n >> bits * column & (1 << bits) - 1] for column in range(columns)]
         for n in numbers],
        np.int8,
    )  # fmt: skip


def tiles(places, form):
    """Codes' places among the levels, [R, C], as a decoder reads them: uint8[R/32, C/16, 128].

    A tile is 32 rows of four bytes. Of the 16 columns of a tile, those that leave the remainder j
    when divided by 4 are in byte j of their row: the first in its lowest two bits, and so on. With
    the form "trits" a tile has 20 columns, and five places are the digits of a number to base 3,
    the first the highest; the byte is the smallest b for which b / 256 is that number / 243 or
    more. What rows and columns leave open is zeros.
    """
    fields = {"2bit": 4, "trits": 5}[form]
    rows, columns = places.shape
    found = np.zeros((-(-rows // 32), -(-columns // (4 * fields)), 128), np.uint8)
    for strip, tile, row, byte in np.ndindex(*found.shape[:2], 32, 4):
        digits = []
        for field in range(fields):
            at = 32 * strip + row, 4 * fields * tile + 4 * field + byte
            digits.append(int(places[at]) if at[0] < rows and at[1] < columns else 0)
        if form == "2bit":
            number = sum(digit << 2 * field for field, digit in enumerate(digits))
        else:
            number = -(-256 * int("".join(map(str, digits)), 3) // 243)
        found[strip, tile, 4 * row + byte] = number
    return found


# --- The C original's model file ------------------------------------------------------------------


class _Reader:
    """Little-endian values from a bytes object, never past its end."""

    def __init__(self, data):
        self.data, self.offset = data, 0

    def take(self, count):
        piece = self.data[self.offset : self.offset + count]
        if count < 0 or len(piece) != count:
            raise ValueError(f"{count} bytes wanted at {self.offset}, the file ends before")
        self.offset += count
        return piece

    def integer(self):
        return struct.unpack("<i", self.take(4))[0]

    def matrix(self, shape):
        self._expect(shape, (self.integer(), self.integer()))
        return np.frombuffer(self.take(shape[0] * shape[1]), np.int8).reshape(shape).astype(float)

    def array(self, size):
        self._expect((size,), (self.integer(),))
        return np.frombuffer(self.take(4 * size), "<f4").astype(float)

    def _expect(self, expected, found):
        if found != expected:
            raise ValueError(f"shape {found} in the file at {self.offset}, expected {expected}")


def read_c_v1(path, *, num_heads=4, ffn_multiplier=4):
    """Read a model file of the C original (``model.c``: ``save_model``).

    The file stores neither the number of heads nor the width of the feed forward; the C original
    fixes both at 4.

    Returns
    -------
    params, config : dict
        As `forward` takes them.
    """
    with open(path, "rb") as file:
        reader = _Reader(file.read())
    if (reader.integer(), reader.integer()) != (C_V1_MAGIC, 1):
        raise ValueError("not a version 1 file of the C original")
    vocab, dim, num_blocks = reader.integer(), reader.integer(), reader.integer()
    ffn = ffn_multiplier * dim
    params = {"embedding.weight": reader.matrix((vocab, dim))}
    for i in range(num_blocks):
        prefix = f"blocks.{i}."
        for name in ("wq", "wk", "wv", "wo"):
            params[prefix + "attention." + name] = reader.matrix((dim, dim))
        for name in ("bq", "bk", "bv", "bo"):
            params[prefix + "attention." + name] = reader.array(dim)
        params[prefix + "ffn.wi"] = reader.matrix((ffn, dim))
        params[prefix + "ffn.wo"] = reader.matrix((dim, ffn))
        params[prefix + "ffn.bi"] = reader.array(ffn)
        params[prefix + "ffn.bo"] = reader.array(dim)
        for name in ("norm1.gamma", "norm1.beta", "norm2.gamma", "norm2.beta"):
            params[prefix + name] = reader.array(dim)
    # Declared [C, V] and used as [V, C]: only a file with both equal has a meaning.
    if vocab != dim:
        raise ValueError(f"vocabulary {vocab} and model_dim {dim} differ: the file has no meaning")
    params["output.weight"] = reader.matrix((vocab, dim))
    params["output.bias"] = reader.array(vocab)
    if reader.offset != len(reader.data):
        raise ValueError(f"{len(reader.data) - reader.offset} bytes after the model")
    config = {
        "vocab_size": vocab,
        "model_dim": dim,
        "num_blocks": num_blocks,
        "num_heads": num_heads,
        "ffn_multiplier": ffn_multiplier,
        "activation": "relu",
        "positions": "none",
        "rope_base": 10000.0,
        "final_norm": False,
        "attention_window": 1,
    }
    return params, config


# --- What the C original answers where it is wrong ------------------------------------------------
# The number is the fault's row in the table of departures.


def fault1_weight_update(weight, gradient):
    """``model.c: apply_ternary_weight_updates``: the weight becomes the gradient's sign."""
    return np.where(gradient != 0, np.sign(gradient), weight)


def fault2_layer_norm_d_beta(d_output):
    """``backward.c``: layer norm's d_beta [C], the sum of all of d_output in every element."""
    return np.full(d_output.shape[-1], d_output.sum())


def fault3_feed_forward_d_wo(d_output, x, weights):
    """``backward.c``: feed forward's d_wo [C, F] from the values before the activation."""
    return _rows(d_output).T @ _rows(linear(x, weights["wi"], weights["bi"]))


def fault4_residual_backward(d_output, d_normalised, x, gamma):
    """``backward.c``: d_x [..., C] of x + sublayer(norm(x)), all of it sent through the norm.

    ``d_normalised`` is the gradient the sub-layer hands back for its input.
    """
    return layer_norm_backward(d_output + d_normalised, x, gamma)[0]


def fault5_output_weight_gradient(d_logits, x):
    """``backward.c``: output layer's weight gradient as [C, V] where the matrix is [V, C]."""
    return _rows(x).T @ _rows(d_logits)


def fault6_attention(x, weights):
    """``forward.c``: attention that copies V, [..., C]: queries, keys and heads do nothing."""
    return linear(linear(x, weights["wv"], weights["bv"]), weights["wo"], weights["bo"])


def fault9_layer_norm(x, gamma, beta, epsilon=NORM_EPSILON):
    """``math_ops.c``: SSE layer norm with 12 bits of 1/std, x [C] -> [C].

    The processor's table of reciprocals is modelled as rounding to 12 significant bits, the
    precision it promises; which way a value is rounded differs between processors.
    """
    x = _float64(x)
    centred = x - x.mean()
    mantissa, exponent = np.frexp(1.0 / np.sqrt((centred**2).mean() + epsilon))
    inv_std = np.ldexp(np.round(mantissa * 2.0**12) / 2.0**12, exponent)
    return gamma * centred * inv_std + beta


# --- Finite differences ---------------------------------------------------------------------------


def directional_difference(f, x, direction, step=1e-4):
    """Derivative of the scalar function f at x along a direction, by central differences.

    Five points, error of order step**4: (f(x-2h) - 8 f(x-h) + 8 f(x+h) - f(x+2h)) / 12 h.
    """
    at = [float(f(x + k * step * direction)) for k in (-2, -1, 1, 2)]
    return (at[0] - 8.0 * at[1] + 8.0 * at[2] - at[3]) / (12.0 * step)


def finite_difference(f, x, step=1e-4):
    """Gradient of the scalar function f at x, one element at a time, in the shape of x."""
    x = _float64(x)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        direction = np.zeros_like(x)
        direction[index] = 1.0
        gradient[index] = directional_difference(f, x, direction, step)
    return gradient
