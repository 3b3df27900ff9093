"""A CLIP with random weights, as transformers saves it; its towers differ in every size."""

from pathlib import Path

from references import torch, transformers

from rcgrpo_jax.weights.tokenizers import write_clip_tokenizer

SIDE = 30  # pixels of what it sees


def write_clip(folder: Path) -> Path:
    """Saves model, tokenizer and processor."""
    vocabulary = write_clip_tokenizer(folder)
    text = dict(vocab_size=vocabulary, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=3,
                eos_token_id=vocabulary - 1, bos_token_id=vocabulary - 2)  # fmt: skip
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=SIDE,
                  patch_size=7)  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name or "lrn" in name:  # which start at 0 and 1
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.3)
    model.save_pretrained(folder)
    crop = {"height": SIDE, "width": SIDE}
    transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
    return folder
