"""The adapter functions of :mod:`compress.adapters` under the names they had here."""

from compress.adapters import attach_adapter as load_adapter
from compress.adapters import lora_config as lora_config

__all__ = ["load_adapter", "lora_config"]
