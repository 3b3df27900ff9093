"""CompBench's official evaluation in torch and torchmetrics, written anew from what the script does.

It shares no code with the package. SqueezeNet has random weights: no package carries the trained ones.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image
from references import Reference, torch, transformers

MEASURES = ("lc_i", "lc_t", "psnr", "ssim", "lpips")
_fn = Reference("torch.nn.functional")
_lpips = Reference("torchmetrics.functional.image.lpips")
_multimodal = Reference("torchmetrics.multimodal")
_image = Reference("torchmetrics.image")


def squeezenet(seed: int = 0) -> torch.nn.Sequential:
    """The trunk of SqueezeNet 1.1 as torchvision numbers it, with random weights."""
    nn = torch.nn

    class Fire(nn.Module):
        def __init__(self, inputs: int, squeezed: int, expanded: int):
            super().__init__()
            self.squeeze = nn.Conv2d(inputs, squeezed, 1)
            self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
            self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

        def forward(self, x):
            x = _fn.relu(self.squeeze(x))
            return torch.cat([_fn.relu(self.expand1x1(x)), _fn.relu(self.expand3x3(x))], 1)

    def pool():
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool(), Fire(64, 16, 64), Fire(128, 16, 64), pool(), Fire(128, 32, 128),
        Fire(256, 32, 128), pool(), Fire(256, 48, 192), Fire(384, 48, 192), Fire(384, 64, 256), Fire(512, 64, 256),
    )  # fmt: skip


def trunk_weights(trunk: torch.nn.Sequential) -> OrderedDict:
    """A state dictionary as torchvision's file has it, the classifier with it."""
    state = OrderedDict((f"features.{key}", x) for key, x in trunk.state_dict().items())
    state["classifier.1.weight"], state["classifier.1.bias"] = torch.zeros(1000, 512, 1, 1), torch.zeros(1000)
    return state


def torch_lpips(net: str, features: torch.nn.Sequential) -> torch.nn.Module:
    """torchmetrics' LPIPS with its own heads on a trunk, which torchvision would give it."""
    with mock.patch("torchmetrics.functional.image.lpips._get_tv_model_features", return_value=features):
        return _lpips._NoTrainLpips(net=net)


class OfficialScript:
    """The script's evaluator.

    Args:
        clip: Folder of a CLIP model.
        trunk: SqueezeNet's.
        side: Pixels; the script has 512.
    """

    def __init__(self, clip: Path, trunk: torch.nn.Sequential, side: int = 512):
        self.side, model = side, transformers.CLIPModel.from_pretrained(clip).eval()
        self.model, self.processor = (
            model,
            transformers.CLIPProcessor(
                image_processor=transformers.CLIPImageProcessorPil.from_pretrained(clip),
                tokenizer=transformers.CLIPTokenizer.from_pretrained(clip),
            ),
        )

        class Adapter(torch.nn.Module):  # transformers 5 gives objects where torchmetrics expects tensors
            config = model.config

            def get_image_features(self, pixels):
                return model.get_image_features(pixels).pooler_output

            def get_text_features(self, ids, attention):
                return model.get_text_features(ids, attention).pooler_output

        self.clip_score = _multimodal.CLIPScore(lambda: (Adapter(), self.processor))
        self.psnr = _image.PeakSignalNoiseRatio(data_range=1.0)
        self.ssim = _image.StructuralSimilarityIndexMeasure(data_range=1.0)
        self.lpips = torch_lpips("squeeze", trunk)

    def measure(
        self, source: Path, edited: Path, mask: Path, target: Path | None, caption: str | None
    ) -> dict[str, float]:
        """The five numbers of one edit, from files."""

        def read(path: Path) -> Image.Image:
            return Image.open(path).convert("RGB").resize((self.side, self.side), Image.Resampling.BICUBIC)

        def tensor(image: Image.Image) -> torch.Tensor:
            return torch.tensor(np.asarray(image).astype(np.float32) / 255).permute(2, 0, 1)[None]

        before, after = read(source), read(edited)
        region = np.array(Image.open(mask).convert("L").resize((self.side, self.side), Image.Resampling.NEAREST))
        shown = 1 - torch.tensor(region.astype(np.float32) / 255)
        a, b = tensor(before) * shown, tensor(after) * shown
        with torch.no_grad():
            found = {
                "psnr": self.psnr(b, a).item(),
                "ssim": self.ssim(b, a).item(),
                "lpips": self.lpips(2 * b - 1, 2 * a - 1).item(),
            }
            rows, columns = np.nonzero(region)
            box = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else (0, 0, 0, 0)
            if not (box[2] > box[0] and box[3] > box[1]):
                return found | {"lc_i": 0.0, "lc_t": 0.0}
            crop = after.crop(tuple(map(int, box)))
            found["lc_t"] = self.clip_score(torch.tensor(np.array(crop)).permute(2, 0, 1), caption or " ").item()
            if target is None:
                return found | {"lc_i": np.nan}
            pair = self.processor(images=[crop, read(target).crop(tuple(map(int, box)))], return_tensors="pt")
            vectors = self.model.get_image_features(**pair).pooler_output
            return found | {"lc_i": _fn.cosine_similarity(vectors[:1], vectors[1:]).item()}
