"""The configuration of NV-Embed's public checkpoints (nvidia/NV-Embed-v1 and -v2), read without their code.

They keep the decoder's settings, Mistral's, in `text_config`.
"""

from __future__ import annotations

from typing import Any

from transformers import MistralConfig

MODEL_TYPE, ARCHITECTURE = "nvembed", "NVEmbedModel"
HEADS = 8  # of the latent attention, where the configuration does not say


class NVEmbedConfig(MistralConfig):
    """Mistral's settings, with those of latent attention beside them."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        values = dict(config_dict)
        text = dict(values.pop("text_config", None) or {})
        for name in ("model_type", "architectures", "auto_map", "_name_or_path"):
            text.pop(name, None)
        return super().from_dict({**values, **text}, **kwargs)

    @property
    def latent_heads(self) -> int:
        settings = getattr(self, "latent_attention_config", None) or {}
        return int(settings.get("num_cross_heads", HEADS))
