"""The oracle's model once more, in PyTorch."""

import math


def torch_loss(torch, params, config, tokens, targets):
    """The model once more, with PyTorch's own norms, activations, softmax and cross entropy."""
    functional = torch.nn.functional
    # Over so little, threads would mostly wait for each other.
    torch.set_num_threads(1)
    batch, time = tokens.shape
    heads = config["num_heads"]
    head_dim = config.get("head_dim", config["model_dim"] // heads)
    epsilon = config.get("norm_epsilon", 1e-5)
    padding = tokens == config["vocab_size"]
    distance = torch.arange(time)[:, None] - torch.arange(time)[None, :]

    def norm(x, name):
        gain = params[name + ".gamma"]
        if config.get("norm") == "rms":
            return functional.rms_norm(x, gain.shape, gain, epsilon)
        return functional.layer_norm(x, gain.shape, gain, params.get(name + ".beta"), epsilon)

    def linear(x, name, letter):
        return functional.linear(x, params[f"{name}.w{letter}"], params.get(f"{name}.b{letter}"))

    def rounded(x):
        # The rounding error counts as a constant: so the gradient goes straight through.
        if not config.get("int8_activations"):
            return x
        step = x.abs().amax(dim=-1, keepdim=True) / 127
        return x + (step * (x / step.where(step > 0, 1.0)).round() - x).detach()

    def before_wo(x, name):
        return rounded(norm(x, name) if config.get("sub_norm") else x)

    def activate(x):
        return {
            "relu": functional.relu,
            "relu2": lambda x: functional.relu(x).square(),
            "silu": functional.silu,
            "gelu": lambda x: functional.gelu(x, approximate="tanh"),
        }[config["activation"]](x)

    def frequencies(dim):
        base, factor = config["rope_base"], config.get("rope_factor", 1.0)
        plain = base ** -(torch.arange(0, dim, 2).double() / dim)
        if factor == 1.0:
            return plain
        # Bounds of the pairs' numbers, as the frequencies at which a pair turns 32 times or once.
        first, last = (
            dim * math.log(config["rope_original_length"] / (turns * 2 * math.pi))
            / (2 * math.log(base))
            for turns in (32, 1)
        )  # fmt: skip
        first, last = max(math.floor(first), 0), min(math.ceil(last), dim - 1)
        ramp = ((torch.arange(dim // 2).double() - first) / max(last - first, 0.001)).clamp(0, 1)
        return torch.lerp(plain, plain / factor, ramp)

    def rotate(x):
        dim = round(head_dim * config.get("rope_fraction", 1.0))
        angles = torch.arange(time).double()[:, None] * frequencies(dim)
        scale = 1 + 0.1 * math.log(config.get("rope_factor", 1.0))
        cos, sin = scale * angles.cos(), scale * angles.sin()
        turning, rest = x[..., :dim], x[..., dim:]
        if config.get("rope_pairs") == "adjacent":
            a, b = turning[..., ::2], turning[..., 1::2]
            turned = torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)
        else:
            a, b = turning.chunk(2, dim=-1)
            turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        return torch.cat([turned, rest], dim=-1)

    def attention(x, name, window):
        x = rounded(x)
        q, k, v = (
            linear(x, name, letter).view(batch, time, -1, head_dim).transpose(1, 2)
            for letter in "qkv"
        )
        if config.get("qk_norm"):
            q = functional.rms_norm(q, (head_dim,), params[name + ".q_gamma"], epsilon)
            k = functional.rms_norm(k, (head_dim,), params[name + ".k_gamma"], epsilon)
        if config["positions"] == "rope":
            q, k = rotate(q), rotate(k)
        k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
        allowed = (distance >= 0) & (distance < (window or time))
        allowed = allowed[None, None] & ~padding[:, None, None, :]
        scores = (q @ k.transpose(2, 3)) / math.sqrt(head_dim)
        # Finite, so that a row without any key has no NaN in its backward pass.
        weights = scores.masked_fill(~allowed, -1e300).softmax(dim=-1) * allowed
        mixed = (weights @ v).transpose(1, 2).reshape(batch, time, -1)
        return linear(before_wo(mixed, name), name, "o")

    def feed_forward(x, name):
        x = rounded(x)
        hidden = linear(x, name, "i")
        hidden = (
            activate(linear(x, name, "g")) * hidden if config.get("gated") else activate(hidden)
        )
        return linear(before_wo(hidden, name), name, "o")

    x = functional.embedding(tokens.clamp(max=config["vocab_size"] - 1), params["embedding.weight"])
    x = x * ~padding[..., None]
    for i in range(config["num_blocks"]):
        window = config["windows"][i] if "windows" in config else config["attention_window"]
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention", window)
        x = x + feed_forward(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.ffn")
    if config["final_norm"]:
        x = norm(x, "final_norm")
    if config.get("ternary_embedding"):
        x = rounded(x)
    last = params["embedding.weight" if config.get("tied_embeddings") else "output.weight"]
    logits = functional.linear(x, last, params.get("output.bias"))
    counted = ~padding & (targets != config["vocab_size"])
    loss = (
        functional.cross_entropy(logits[counted], targets[counted])
        if counted.any()
        else logits.sum() * 0.0
    )
    return logits, loss
