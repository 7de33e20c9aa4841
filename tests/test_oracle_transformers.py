"""The oracle against the models of transformers: llama, qwen3 and bitnet, in float64.

transformers computes the angles of rotary positions in float32, whatever the model has, so that the
answers agree to about 1e-6.
"""

import numpy as np
import pytest

from helpers import oracle
from helpers.arrays import assert_close

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 13,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-3,
    "attention_dropout": 0.0,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
PLAIN = {"rope_type": "default", "rope_theta": 500.0}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0}
YARN["original_max_position_embeddings"] = 64

# The class of a model, its settings, and what the oracle calls them where they differ.
MODELS = {
    "llama": ("Llama", {"head_dim": 6, "hidden_act": "silu", "rope_parameters": PLAIN}, {}),
    "llama with biases": (
        "Llama",
        {"head_dim": 10, "hidden_act": "gelu_pytorch_tanh", "attention_bias": True,
         "mlp_bias": True, "rope_parameters": PLAIN},
        {"activation": "gelu"},
    ),
    "llama tied": (
        "Llama",
        {"head_dim": 6, "hidden_act": "relu", "rope_parameters": PLAIN,
         "tie_word_embeddings": True, "num_key_value_heads": 1},
        {"activation": "relu"},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10, "rope_parameters": PLAIN}, {"qk_norm": True}),
    "qwen3 with yarn": ("Qwen3", {"head_dim": 20, "rope_parameters": YARN}, {"qk_norm": True}),
    "qwen3 with yarn, few pairs": (
        "Qwen3",
        {"head_dim": 6, "rope_parameters": YARN, "num_key_value_heads": 4},
        {"qk_norm": True},
    ),
    "qwen3 with windows": (
        "Qwen3",
        {"head_dim": 8, "rope_parameters": PLAIN, "use_sliding_window": True, "sliding_window": 3,
         "layer_types": ["sliding_attention", "full_attention"]},
        {"qk_norm": True, "windows": (3, 0)},
    ),
    "bitnet": (
        "BitNet",
        {"hidden_act": "relu2", "rope_parameters": PLAIN, "tie_word_embeddings": True},
        {"activation": "relu2", "sub_norm": True},
    ),
    "bitnet with silu": (
        "BitNet",
        {"hidden_act": "silu", "rope_parameters": PLAIN, "tie_word_embeddings": False},
        {"sub_norm": True},
    ),
}  # fmt: skip

# The oracle's names for the parameters of a block.
NAMES = {
    **{f"attention.{k}{x}": f"self_attn.{x}_proj.{p}"
       for k, p in (("w", "weight"), ("b", "bias")) for x in "qkvo"},
    **{f"ffn.{k}{x}": f"mlp.{name}_proj.{p}"
       for k, p in (("w", "weight"), ("b", "bias"))
       for x, name in (("g", "gate"), ("i", "up"), ("o", "down"))},
    "attention.q_gamma": "self_attn.q_norm.weight",
    "attention.k_gamma": "self_attn.k_norm.weight",
    "attention.gamma": "self_attn.attn_sub_norm.weight",
    "ffn.gamma": "mlp.ffn_sub_norm.weight",
    "norm1.gamma": "input_layernorm.weight",
    "norm2.gamma": "post_attention_layernorm.weight",
}  # fmt: skip


def oracle_names(model):
    """The parameters of a model by the oracle's names."""
    theirs = dict(model.named_parameters())
    ours = {"embedding.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight",
            "final_norm.gamma": "model.norm.weight"}  # fmt: skip
    for i in range(model.config.num_hidden_layers):
        ours |= {f"blocks.{i}.{name}": f"model.layers.{i}.{their}"
                 for name, their in NAMES.items()}  # fmt: skip
    found = {name: theirs.pop(their) for name, their in ours.items() if their in theirs}
    assert not theirs
    return found


@pytest.mark.parametrize(("kind", "settings", "changes"), MODELS.values(), ids=MODELS)
def test_the_oracle_is_the_model_of_transformers(kind, settings, changes):
    torch.manual_seed(1)
    torch.set_num_threads(1)
    config = getattr(transformers, kind + "Config")(**{**SIZES, **settings})
    config._attn_implementation = "eager"
    model = getattr(transformers, kind + "ForCausalLM")(config).double().eval()
    leaves = oracle_names(model)
    rng = np.random.default_rng(2)
    with torch.no_grad():
        for name, leaf in leaves.items():
            middle = 1.0 if name.endswith("gamma") else 0.0
            leaf.copy_(torch.tensor(rng.normal(middle, 0.4, tuple(leaf.shape))))
    rope = config.rope_parameters
    ours = {
        "vocab_size": config.vocab_size, "model_dim": config.hidden_size,
        "num_blocks": config.num_hidden_layers, "num_heads": config.num_attention_heads,
        "head_dim": settings.get("head_dim", 6), "positions": "rope",
        "rope_base": rope["rope_theta"], "rope_factor": rope.get("factor", 1.0),
        "rope_original_length": rope.get("original_max_position_embeddings", 0),
        "activation": "silu", "gated": True, "norm": "rms", "norm_epsilon": config.rms_norm_eps,
        "final_norm": True, "attention_window": 0,
        "tied_embeddings": "output.weight" not in leaves, **changes,
    }  # fmt: skip
    params = {name: leaf.detach().numpy() for name, leaf in leaves.items()}
    tokens = rng.integers(0, config.vocab_size, (2, 9))
    targets = np.concatenate([tokens[:, 1:], np.full((2, 1), config.vocab_size)], axis=1)

    theirs = torch.tensor(tokens)
    output = model(input_ids=theirs, labels=theirs)
    output.loss.backward()
    logits = oracle.forward(params, ours, tokens)[0]
    assert_close(logits, output.logits.detach().numpy(), rtol=1e-5, atol=1e-5)
    loss, gradients = oracle.loss_and_gradients(params, ours, tokens, targets)
    assert_close(loss, output.loss.item(), rtol=1e-5, atol=0)
    assert gradients.keys() == leaves.keys()
    for name, gradient in gradients.items():
        expected = leaves[name].grad.numpy()
        largest = np.abs(expected).max()
        assert_close(gradient, expected, rtol=1e-4, atol=1e-5 * largest, what=name)
