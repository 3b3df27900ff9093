"""LoRA files, in and out: every form that programs for FLUX write, and the ones that they read."""

from rcgrpo_jax.weights.lora.read import holds_lora, load_lora, load_loras
from rcgrpo_jax.weights.lora.write import FORMS, LORA_FILE, adapter_fingerprint, lora_file, save_lora

__all__ = [
    "FORMS", "LORA_FILE", "adapter_fingerprint", "holds_lora", "load_lora", "load_loras", "lora_file", "save_lora",
]  # fmt: skip
