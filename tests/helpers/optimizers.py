"""Every optimizer step in the float64 of the oracle, and how far off it may be."""

import math

import numpy as np

from helpers import oracle
from helpers.arrays import UNIT_ROUNDOFF, gamma
from helpers.models import rounding_effect
from legacy1bit.layout import parameter_layout
from legacy1bit.optimizer import SGD, AdamW, Muon

OPTIMIZERS = (AdamW, Muon, SGD)

ADAMW = {"beta1": 0.9, "beta2": 0.99, "epsilon": 1e-8, "weight_decay": 0.1}
DEFAULTS = {
    AdamW: ADAMW,
    Muon: {**ADAMW, "muon_lr_ratio": 3.3, "momentum": 0.95},
    SGD: {"momentum": 0.9, "weight_decay": 0.1},
}


def flat(model):
    return np.concatenate([values.ravel() for values in model.latent.values()])


def float32(value):
    """The value that is left of a setting in float32."""
    return float(np.float32(value))


def rules(optimizer):
    """Start, stop, shape and rule of every parameter: "sign", "muon", "sgd" or "adamw"."""
    config = optimizer.model.config
    for part in parameter_layout(config):
        matrix = part.kind != "vector"
        if config.scheme == "sign" and part.kind == "quantized":
            rule = "sign"
        elif isinstance(optimizer, SGD):
            rule = "sgd"
        elif isinstance(optimizer, Muon) and matrix and part.name.startswith("blocks."):
            rule = "muon"
        else:
            rule = "adamw"
        yield part.start, part.stop, part.shape, rule


def exact_adamw(arrays, rate, step, beta1, beta2, epsilon, weight_decay):
    """The new weights, m and v of one step of the oracle, and how far off each may be."""
    weight, m, v, gradient = (arrays[name] for name in ("weight", "first", "second", "gradient"))
    new_weight, new_m, new_v = oracle.adamw_step(
        weight, gradient, m, v, step, learning_rate=rate, beta1=beta1, beta2=beta2,
        epsilon=epsilon, weight_decay=weight_decay,
    )  # fmt: skip
    # Roundings: the clipping factor and the product with it, 1 - beta, two products and a sum;
    # the gradient's square doubles the first two.
    m_bound = gamma(6) * (beta1 * np.abs(m) + (1 - beta1) * np.abs(gradient))
    v_bound = gamma(9) * new_v
    # The quotient: half of v's error, and of each correction, product, root, sum and division one.
    size = rate / (1 - beta1**step) / (np.sqrt(new_v / (1 - beta2**step)) + epsilon)
    bound = size * m_bound + gamma(14) * size * np.abs(new_m) + gamma(4) * np.abs(weight)
    return (new_weight, new_m, new_v), (bound, m_bound, v_bound)


def exact_sgd(arrays, rate, momentum, weight_decay):
    """The same of one step of SGD, which leaves the second moments."""
    weight, first, gradient = (arrays[name] for name in ("weight", "first", "gradient"))
    new_weight, new_first = oracle.sgd_step(
        weight, gradient, first, learning_rate=rate, mu=momentum, weight_decay=weight_decay
    )
    # Roundings: the clipping factor, two products and a sum.
    first_bound = gamma(4) * (momentum * np.abs(first) + np.abs(gradient))
    # The factor of the decay, two, a product with either and the sum.
    bound = rate * first_bound + gamma(4) * (np.abs(weight) + rate * np.abs(new_first))
    return (new_weight, new_first, arrays["second"]), (bound, first_bound, 0.0)


def exact_muon(weight, momentum, gradient, rate, decay, mu):
    """The new weight and momentum of one matrix [R, C] (Jordan et al. 2024)."""
    momentum = mu * momentum + gradient
    update = gradient + mu * momentum
    x = update if len(update) <= len(update[0]) else update.T
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    x = x if len(update) <= len(update[0]) else x.T
    size = rate * math.sqrt(max(1.0, weight.shape[0] / weight.shape[1]))
    return {"weight": (1.0 - rate * decay) * weight - size * x, "momentum": momentum}


def exact_orthogonal(arrays, rate, shape, momentum, weight_decay):
    """The same of one step of Muon on a matrix. Not clipped: only the direction counts."""
    names = {"weight": "weight", "first": "momentum", "whole_gradient": "gradient"}
    values, effects = rounding_effect(
        lambda a: exact_muon(**a, rate=rate, decay=weight_decay, mu=momentum),
        {new: arrays[name].reshape(shape) for name, new in names.items()},
    )
    bounds = [8 * (effects[name] + UNIT_ROUNDOFF * np.abs(values[name]).max())
              for name in ("weight", "momentum")]  # fmt: skip
    new = values["weight"].ravel(), values["momentum"].ravel(), arrays["second"]
    return new, (*bounds, 0.0)


def exact_step(optimizer, gradient, rate, factor, given):
    """The new weights and moments of the oracle, and how far off each may be."""
    settings = {**DEFAULTS[type(optimizer)], **given, "weight_decay": optimizer.weight_decay}
    direction = settings.pop("sign_direction", "descend")
    settings = {name: float32(value) for name, value in settings.items()}
    ratio, decay = settings.pop("muon_lr_ratio", 1.0), settings.pop("weight_decay")
    adam = {name: settings[name] for name in ("beta1", "beta2", "epsilon") if name in settings}
    before = {
        "weight": flat(optimizer.model),
        "first": optimizer.first,
        "second": optimizer.second,
        "gradient": factor * gradient.astype(float),
        "whole_gradient": gradient,
    }
    exact, bounds = np.zeros((2, 3, gradient.size))
    for start, stop, shape, rule in rules(optimizer):
        arrays = {name: array[start:stop].astype(float) for name, array in before.items()}
        decayed = decay if len(shape) == 2 else 0.0
        if rule == "sign":
            new = oracle.sign_step(arrays["weight"], arrays["whole_gradient"], direction)
            answer, bound = (new, arrays["first"], arrays["second"]), (0.0, 0.0, 0.0)
        elif rule == "sgd":
            answer, bound = exact_sgd(arrays, rate, settings["momentum"], decayed)
        elif rule == "muon":
            momentum = settings["momentum"]
            answer, bound = exact_orthogonal(arrays, rate * ratio, shape, momentum, decayed)
        else:
            answer, bound = exact_adamw(
                arrays, rate, optimizer.steps + 1, weight_decay=decayed, **adam
            )
        for i in range(3):
            exact[i, start:stop], bounds[i, start:stop] = answer[i], bound[i]
    return exact, bounds
