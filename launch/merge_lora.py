"""Merges a LoRA of a vision-language model into its base, for a server: python launch/merge_lora.py LORA BASE OUT.

An empty BASE is the one that the LoRA itself names. Needs torch, transformers and peft.
"""

import sys

import torch
from peft import PeftConfig, PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

lora, base, out = sys.argv[1:]
base = base or PeftConfig.from_pretrained(lora).base_model_name_or_path
model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, lora).merge_and_unload().save_pretrained(out)
AutoProcessor.from_pretrained(base).save_pretrained(out)
