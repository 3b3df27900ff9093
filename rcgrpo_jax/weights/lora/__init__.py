"""LoRA files, in and out: every form that programs for FLUX write, and the ones that they read."""

from rcgrpo_jax.weights.lora.read import load_lora, load_loras
from rcgrpo_jax.weights.lora.write import FORMS, LORA_FILE, adapter_fingerprint, save_lora

__all__ = ["FORMS", "LORA_FILE", "adapter_fingerprint", "load_lora", "load_loras", "save_lora"]
