"""One change of FLUX's weights in the LoRA files of many programs, written apart from `rcgrpo_jax.weights.lora`.

Each form gives a file's tensors, its metadata, and what it adds to each weight: diffusers' module -> [out, in].
"""

import json
from collections.abc import Callable, Iterator, Mapping

import ml_dtypes
import numpy as np
from bfl_layout import DOUBLE, SINGLE, TOP

from rcgrpo_jax.models.config import MMDiTConfig

Tensors = dict[str, np.ndarray]
Deltas = dict[str, np.ndarray]
RANK, ALPHA = 4, 2.0


def bfl_modules(config: MMDiTConfig) -> dict[str, list[str]]:
    """BFL's linear layer -> the modules of diffusers in its rows."""
    found = {bfl: [module] for bfl, module in TOP.items()}
    for blocks, table, theirs, count in (
        ("double_blocks", DOUBLE, "transformer_blocks", config.num_layers),
        ("single_blocks", SINGLE, "single_transformer_blocks", config.num_single_layers),
    ):
        for i in range(count):
            found |= {f"{blocks}.{i}.{bfl}": [f"{theirs}.{i}.{m}" for m in ms.split()] for bfl, ms in table.items()}
    return found


def factors(shape: tuple[int, int], seed: int, rank: int = RANK) -> tuple[np.ndarray, np.ndarray]:
    """A [r, in] and B [out, r]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rank, shape[1]), np.float32), rng.standard_normal((shape[0], rank), np.float32)


def swapped(module: str, delta: np.ndarray) -> np.ndarray:
    """BFL's rows of a module as diffusers has them: (shift, scale) of the last modulation are exchanged."""
    return np.concatenate(np.split(delta, 2)[::-1]) if module == "norm_out.linear" else delta


class Forms:
    """The forms, for a transformer.

    Args:
        config: Of the transformer.
        shapes: diffusers' module -> [out, in].
    """

    def __init__(self, config: MMDiTConfig, shapes: Mapping[str, tuple[int, int]]):
        self.config, self.shapes = config, shapes
        self.attention = [m for m in shapes if ".attn." in m]

    def fused(self, chosen: Callable[[str], bool] = lambda name: True) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """BFL's layers with their factors."""
        for n, (name, modules) in enumerate(bfl_modules(self.config).items()):
            if all(m in self.shapes for m in modules) and chosen(name):
                rows = sum(self.shapes[m][0] for m in modules)
                yield name, *factors((rows, self.shapes[modules[0]][1]), n)

    def split(self, name: str, delta: np.ndarray) -> Deltas:
        modules = bfl_modules(self.config)[name]
        ends = np.cumsum([self.shapes[m][0] for m in modules])[:-1]
        return {m: swapped(m, x) for m, x in zip(modules, np.split(delta, ends), strict=True)}

    def bfl(self, key: str, a: str, b: str, alpha: str = "", chosen=lambda name: True, dots: bool = True):
        """A file with BFL's names: `key` has a place for the layer; without `alpha` the scale is 1."""
        tensors, deltas = {}, {}
        for name, down, up in self.fused(chosen):
            layer = key.format(name if dots else name.replace(".", "_"))
            tensors |= {f"{layer}.{a}": down, f"{layer}.{b}": up}
            if alpha:
                tensors[f"{layer}.{alpha}"] = np.array(ALPHA, np.float32)
            deltas |= self.split(name, (ALPHA / RANK if alpha else 1.0) * up @ down)
        return tensors, {}, deltas

    def peft(self, key: str = "transformer.{}.lora_{}.weight", modules=None, rank=lambda m: RANK, dtype=np.float32):
        """A file with diffusers' names, at a scale of 1."""
        tensors, deltas = {}, {}
        for n, m in enumerate(modules or self.attention):
            a, b = (x.astype(dtype) for x in factors(self.shapes[m], n, rank(m)))
            tensors |= {key.format(m, "A"): a, key.format(m, "B"): b}
            deltas[m] = b.astype(np.float32) @ a.astype(np.float32)
        return tensors, {}, deltas

    def with_alphas(self):
        tensors, _, deltas = self.peft()
        alphas = {m: np.array(1 + n % 3, np.float32) for n, m in enumerate(self.attention)}
        tensors |= {f"transformer.{m}.alpha": alpha for m, alpha in alphas.items()}
        return tensors, {}, {m: delta * alphas[m] / RANK for m, delta in deltas.items()}

    def with_settings(self, scale: Callable[[str], float], rank=lambda m: RANK, **settings):
        tensors, _, deltas = self.peft(rank=rank)
        settings |= {"target_modules": self.attention}
        text = json.dumps({f"transformer.{name}": x for name, x in settings.items()})
        return tensors, {"lora_adapter_metadata": text}, {m: scale(m) * delta for m, delta in deltas.items()}

    def xlabs(self):
        """Attention alone, in processors; `linear1` of single blocks without its MLP."""
        names = {"img_attn.qkv": "qkv_lora1", "txt_attn.qkv": "qkv_lora2", "img_attn.proj": "proj_lora1",
                 "txt_attn.proj": "proj_lora2", "linear1": "qkv_lora", "linear2": "proj_lora"}  # fmt: skip
        tensors, deltas = {}, {}
        for name, down, up in self.fused(lambda name: name.split(".", 2)[-1] in names):
            kind, number, layer = name.split(".", 2)
            block = f"{kind}.{number}"
            if layer == "linear1":
                up = up[: 3 * self.config.width]
            key = f"{block}.processor.{names[layer]}"
            tensors |= {f"{key}.down.weight": down, f"{key}.up.weight": up}
            modules = bfl_modules(self.config)[name][: 3 if layer == "linear1" else None]
            ends = np.cumsum([self.shapes[m][0] for m in modules])[:-1]
            deltas |= dict(zip(modules, np.split(up @ down, ends), strict=True))
        return tensors, {}, deltas

    def beside_text_encoders(self):
        tensors, metadata, deltas = self.bfl("lora_unet_{}", "lora_down.weight", "lora_up.weight", "alpha", dots=False)
        te = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": np.ones((4, 8), np.float32)}
        return tensors | te, metadata, deltas

    def all(self) -> dict[str, Callable[[], tuple[Tensors, dict[str, str], Deltas]]]:
        """Name -> (tensors, metadata, deltas)."""
        down_up = ("lora_down.weight", "lora_up.weight")
        a_b = ("lora_A.weight", "lora_B.weight")
        patterns = {"rank_pattern": {"attn.to_q": 2}, "alpha_pattern": {"attn.to_q": 6, "to_k": 1.0}}
        odd = [m for m in self.attention if ".1." in m]
        return {
            "kohya": lambda: self.bfl("lora_unet_{}", *down_up, "alpha", dots=False),
            "kohya, some blocks": lambda: self.bfl(
                "lora_unet_{}", *down_up, "alpha", lambda name: ".1." in name, dots=False
            ),
            "ComfyUI": lambda: self.bfl("diffusion_model.{}", *down_up),
            "ComfyUI, model.": lambda: self.bfl("model.diffusion_model.{}", *down_up, "alpha"),
            "ComfyUI, lora_A": lambda: self.bfl("diffusion_model.{}", *a_b),
            "BFL without prefix": lambda: self.bfl("{}", *a_b),
            "fal": lambda: self.bfl("base_model.model.{}", *a_b),
            "XLabs": self.xlabs,
            "diffusers": self.peft,
            "diffusers, alphas": self.with_alphas,
            "diffusers, all layers": lambda: self.peft(modules=list(self.shapes)),
            "diffusers, ranks": lambda: self.peft(rank=lambda m: 2 + len(m) % 3),
            "diffusers, some blocks": lambda: self.peft(modules=odd),
            "diffusers, float16": lambda: self.peft(dtype=np.float16),
            "diffusers, bfloat16": lambda: self.peft(dtype=ml_dtypes.bfloat16),
            "diffusers, float8": lambda: self.peft(dtype=ml_dtypes.float8_e4m3fn),
            "without prefix": lambda: self.peft("{}.lora_{}.weight"),
            "PEFT": lambda: self.peft("base_model.model.{}.lora_{}.weight"),
            "PEFT, default": lambda: self.peft("base_model.model.{}.lora_{}.default.weight"),
            "OneTrainer": lambda: self.onetrainer(),
            "settings": lambda: self.with_settings(lambda m: 0.5, r=4, lora_alpha=2, init_lora_weights=True),
            "settings, rslora": lambda: self.with_settings(lambda m: 3 / 2, r=4, lora_alpha=3, use_rslora=True),
            "settings, patterns": lambda: self.with_settings(
                lambda m: 6 / 2 if m.endswith("attn.to_q") else 0.25 if m.endswith("to_k") else 2.0,
                lambda m: 2 if m.endswith("attn.to_q") else 4, r=4, lora_alpha=8, **patterns,
            ),
            "beside text encoders": self.beside_text_encoders,
        }  # fmt: skip

    def onetrainer(self):
        tensors, deltas = {}, {}
        for n, m in enumerate(self.attention):
            a, b = factors(self.shapes[m], n)
            key = f"lora_transformer_{m.replace('.', '_')}"
            tensors |= {
                f"{key}.lora_down.weight": a,
                f"{key}.lora_up.weight": b,
                f"{key}.alpha": np.array(ALPHA, np.float32),
            }
            deltas[m] = ALPHA / RANK * b @ a
        return tensors, {}, deltas
