"""A vision-language model of 0.2 M parameters that has learned to say how red a picture is, for a real server."""

from pathlib import Path

import numpy as np
from references import torch, transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

QUESTION = 'How red is this picture? Answer {"score": NUMBER}.'
LEVELS = (0, 6, 12, 18, 25)  # the answers: fifths of red
SIDE, PATCH = 28, 14  # pixels
CHAT = (
    "{% for m in messages %}<s>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def answer(level: int) -> str:
    return f'{{"score": {LEVELS[level]}}}'


def make_processor():
    """A byte-level tokenizer and CLIP's pictures, in LLaVA's form."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>", "<image>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([QUESTION, *map(answer, range(len(LEVELS)))], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    pictures = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    return transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=fast, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT,
    )  # fmt: skip


def make_model(tokenizer):
    """LLaVA with random weights."""
    special = dict(zip(("pad_token_id", "bos_token_id", "eos_token_id"), range(3), strict=True))
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=1024, tie_word_embeddings=True, **special,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE,
        patch_size=PATCH, projection_dim=32,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=3, image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=-2,
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    model.generation_config = transformers.GenerationConfig(**special)
    return model


def train(folder: Path, steps: int = 300, batch: int = 32) -> float:
    """Trains the judge on pictures of one colour, saves it in a folder, and returns its share of right answers."""
    torch.manual_seed(0)
    rng, processor = np.random.default_rng(0), make_processor()
    model = make_model(processor.tokenizer)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    asked = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    right = 0.0
    for _ in range(steps):
        colours = rng.integers(0, 256, (batch, 1, 1, 3))
        pictures = (colours + rng.normal(0, 2, (batch, SIDE, SIDE, 3))).clip(0, 255).astype(np.uint8)
        answers = [answer(int(red) * 5 // 256) + "</s>" for red in colours[:, 0, 0, 0]]
        inputs = processor(
            text=[asked + text for text in answers], images=[*pictures], return_tensors="pt", padding=True,
            padding_side="left",
        )  # fmt: skip
        target = torch.full_like(inputs["input_ids"], -100)
        for row, text in enumerate(answers):
            count = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
            target[row, -count:] = inputs["input_ids"][row, -count:]
        logits, target = model(**inputs).logits[:, :-1], target[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        right = ((logits.argmax(-1) == target) | (target == -100)).all(1).float().mean().item()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return right
