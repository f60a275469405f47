"""The shape of a model, from its config.json: how many parameters there are, where, and which a token uses.

Counts are exact for the families that `_FAMILIES` names; tests/budget/test_shape.py compares them with models
that transformers builds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from katcore.config import ModelSettings
from katcore.errors import ConfigError

_FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
_NEEDED = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder-only model. Without experts, `experts` is 0; of `layers`, `sparse_layers` have them.

    `intermediate` is the width of a dense MLP, `expert_intermediate` of one expert. `query_bias` is the bias
    of queries, keys and values, `out_bias` that of the attention's output.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    context: int
    is_tied: bool
    query_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    has_head_norms: bool = False
    experts: int = 0
    experts_per_token: int = 0
    expert_intermediate: int = 0
    sparse_layers: int = 0

    @property
    def query_width(self) -> int:
        """Of all query heads together."""
        return self.heads * self.head_size

    @property
    def kv_width(self) -> int:
        """Of all key heads together; values have the same."""
        return self.kv_heads * self.head_size

    @property
    def num_parameters(self) -> int:
        """All; tied embeddings count once."""
        dense = self.layers - self.sparse_layers
        return self.ends + dense * self.dense_layer + self.sparse_layers * self.sparse_layer

    @property
    def num_active(self) -> int:
        """Those that one token uses: of the experts, only the ones it is sent to."""
        idle = self.experts - self.experts_per_token
        return self.num_parameters - self.sparse_layers * idle * self.expert

    @property
    def products(self) -> int:
        """Of linear layers, without biases, and of experts: what layers multiply with, but for routers."""
        attention = 2 * self.hidden * (self.query_width + self.kv_width)
        dense = (self.layers - self.sparse_layers) * 3 * self.hidden * self.intermediate
        return self.layers * attention + dense + self.sparse_layers * self.experts * self.expert

    @property
    def routers(self) -> int:
        """Of what sends tokens to experts."""
        return self.sparse_layers * self.hidden * self.experts

    @property
    def ends(self) -> int:
        """Of what is no layer: embedding, last norm, output projection."""
        return self.embedding * (1 if self.is_tied else 2) + self.hidden

    @property
    def embedding(self) -> int:
        """Of the vocabulary's vectors, and of the projection onto it."""
        return self.vocabulary * self.hidden

    @property
    def expert(self) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.expert_intermediate

    @property
    def attention(self) -> int:
        """Of one layer's attention, its norm included."""
        num = 2 * self.hidden * (self.query_width + self.kv_width) + self.hidden
        num += (self.query_width + 2 * self.kv_width) * self.query_bias
        num += self.hidden * self.out_bias
        return num + 2 * self.head_size * self.has_head_norms

    @property
    def dense_layer(self) -> int:
        """Of a layer with a dense MLP."""
        biases = (2 * self.intermediate + self.hidden) * self.mlp_bias
        return self.attention + 3 * self.hidden * self.intermediate + biases + self.hidden

    @property
    def sparse_layer(self) -> int:
        """Of a layer with experts, and the router before them."""
        router = self.hidden * self.experts
        return self.attention + router + self.experts * self.expert + self.hidden

    @property
    def largest_layer(self) -> int:
        """Of the largest layer."""
        if self.sparse_layers == self.layers:
            return self.sparse_layer
        return max(self.dense_layer, self.sparse_layer if self.sparse_layers else 0)

    def adapters(self, rank: int, targets: str | tuple[str, ...] = "all-linear") -> int:
        """Of LoRA: for each matrix from n to m, rank * (n + m). Experts and router have none.

        `targets` are names of matrices as transformers has them, such as `q_proj`; `all-linear` is all
        outside of the vocabulary.
        """
        q, kv, wide = self.query_width, self.kv_width, self.intermediate
        attention = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": q}
        mlp = dict.fromkeys(("gate_proj", "up_proj", "down_proj"), wide)
        dense = self.layers - self.sparse_layers
        return sum(
            rank * (self.hidden + other) * num
            for sizes, num in ((attention, self.layers), (mlp, dense))
            for name, other in sizes.items()
            if targets == "all-linear" or name in targets
        )

    def kv_bytes(self, element: int = 2) -> int:
        """Keys and values of one token, in all layers."""
        return 2 * self.layers * self.kv_width * element


def shape_of(config: Mapping[str, Any], source: str) -> Shape:
    """The shape that a config.json says; `source` is named in errors.

    Raises:
        ConfigError: a family whose parameters are not known here, or a key is missing; says which.
    """
    family = config.get("model_type", "")
    if family not in _FAMILIES:
        raise ConfigError(
            f"{source}: model_type {family!r} cannot be estimated; known are: {', '.join(_FAMILIES)}"
        )
    if missing := [key for key in _NEEDED if key not in config]:
        raise ConfigError(
            f"{source}: {', '.join(missing)} is missing; is it a model's config.json?"
        )
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    bias = bool(config.get("attention_bias", False))
    return Shape(
        hidden=config["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        context=config.get("max_position_embeddings", 0),
        is_tied=bool(config.get("tie_word_embeddings", False)),
        query_bias=bias or family == "qwen2",
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        has_head_norms=family.startswith("qwen3"),
        **_experts(config, family, layers),
    )


def _experts(config: Mapping[str, Any], family: str, layers: int) -> dict[str, int]:
    if family == "mixtral":
        return {
            "experts": config["num_local_experts"],
            "experts_per_token": config["num_experts_per_tok"],
            "expert_intermediate": config["intermediate_size"],
            "sparse_layers": layers,
        }
    if family != "qwen3_moe":
        return {}
    every, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    return {
        "experts": config["num_experts"],
        "experts_per_token": config["num_experts_per_tok"],
        "expert_intermediate": config["moe_intermediate_size"],
        "sparse_layers": sum(
            layer not in dense and (layer + 1) % every == 0 for layer in range(layers)
        ),
    }


def shape_from_file(path: Path) -> Shape:
    """The shape of a model folder, or of a config.json.

    Raises:
        ConfigError: not there, not JSON, or not a known family.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        return shape_of(json.loads(file.read_bytes()), str(file))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid JSON: {error}") from error


@cache
def known_models() -> Mapping[str, Mapping[str, Any]]:
    """Configs of well-known models by their names on the Hugging Face hub: what parameters depend on."""
    content: Mapping[str, Mapping[str, Any]] = json.loads(
        Path(__file__).with_name("models.json").read_bytes()
    )
    return content


def scratch_config(settings: ModelSettings) -> dict[str, Any]:
    """The config of the small Llama that stage `base` trains."""
    return {
        "model_type": "llama",
        "hidden_size": settings.hidden,
        "intermediate_size": settings.hidden * 8 // 3 // 8 * 8,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads,
        "vocab_size": settings.vocabulary,
        "max_position_embeddings": settings.context,
        "tie_word_embeddings": True,
        "attention_bias": True,
    }
