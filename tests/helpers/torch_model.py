"""The oracle's model once more, in PyTorch."""

import math


def torch_loss(torch, params, config, tokens, targets):
    """The model once more, with PyTorch's own norm, rotation, softmax and cross entropy."""
    functional = torch.nn.functional
    # Over so little, threads would mostly wait for each other.
    torch.set_num_threads(1)
    batch, time = tokens.shape
    dim, heads = config["model_dim"], config["num_heads"]
    head_dim = dim // heads
    padding = tokens == config["vocab_size"]
    distance = torch.arange(time)[:, None] - torch.arange(time)[None, :]
    reach = config["attention_window"] or time
    allowed = ((distance >= 0) & (distance < reach))[None, None] & ~padding[:, None, None, :]

    def norm(x, name):
        gain, bias = params[name + ".gamma"], params[name + ".beta"]
        return functional.layer_norm(x, gain.shape, gain, bias)

    def rounded(x):
        # The rounding error counts as a constant: so the gradient goes straight through.
        if not config.get("int8_activations"):
            return x
        step = x.abs().amax(dim=-1, keepdim=True) / 127
        return x + (step * (x / step.where(step > 0, 1.0)).round() - x).detach()

    def before_wo(x, name):
        return rounded(norm(x, name) if config.get("sub_norm") else x)

    def rotate(x):
        # A pair as one complex number, turned by exp(i angle).
        frequencies = config["rope_base"] ** -(torch.arange(0, head_dim, 2) / head_dim).double()
        angles = torch.arange(time).double()[:, None] * frequencies
        pairs = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag], dim=-1)

    def attention(x, name):
        x = rounded(x)
        q, k, v = (
            functional.linear(x, params[f"{name}.w{p}"], params[f"{name}.b{p}"])
            .view(batch, time, heads, head_dim)
            .transpose(1, 2)
            for p in "qkv"
        )
        if config["positions"] == "rope":
            q, k = rotate(q), rotate(k)
        scores = (q @ k.transpose(2, 3)) / math.sqrt(head_dim)
        # Finite, so that a row without any key has no NaN in its backward pass.
        weights = scores.masked_fill(~allowed, -1e300).softmax(dim=-1) * allowed
        mixed = before_wo((weights @ v).transpose(1, 2).reshape(batch, time, dim), name)
        return functional.linear(mixed, params[name + ".wo"], params[name + ".bo"])

    def feed_forward(x, name):
        x = functional.linear(rounded(x), params[name + ".wi"], params[name + ".bi"]).relu()
        if config["activation"] == "relu2":
            x = x.square()
        x = before_wo(x, name)
        return functional.linear(x, params[name + ".wo"], params[name + ".bo"])

    x = functional.embedding(tokens.clamp(max=config["vocab_size"] - 1), params["embedding.weight"])
    x = x * ~padding[..., None]
    for i in range(config["num_blocks"]):
        x = x + attention(norm(x, f"blocks.{i}.norm1"), f"blocks.{i}.attention")
        x = x + feed_forward(norm(x, f"blocks.{i}.norm2"), f"blocks.{i}.ffn")
    if config["final_norm"]:
        x = norm(x, "final_norm")
    if config.get("ternary_embedding"):
        x = rounded(x)
    logits = functional.linear(x, params["output.weight"], params["output.bias"])
    counted = ~padding & (targets != config["vocab_size"])
    loss = (
        functional.cross_entropy(logits[counted], targets[counted])
        if counted.any()
        else logits.sum() * 0.0
    )
    return logits, loss
