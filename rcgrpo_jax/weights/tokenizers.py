"""The two tokenizers of FLUX: CLIP's byte-level BPE and T5's unigram model, read, written small, and applied.

Reading is transformers' work, so that ids are those of diffusers. The small tokenizers are for small random editors:
they are made from the word lists below, without training, and have FLUX's special tokens, case rules and padding.
"""

from __future__ import annotations

import json
import logging
import os
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge
from jaxtyping import Int

from rcgrpo_jax.borders import conform, read_object
from rcgrpo_jax.errors import UserError, reason
from rcgrpo_jax.filetypes import LFS_POINTER, LFS_REMEDY, describe
from rcgrpo_jax.weights.folder_json import COPY_SETTINGS, TokenizerSettings

if TYPE_CHECKING:
    from transformers import CLIPTokenizer, T5TokenizerFast

logger = logging.getLogger(__name__)

CLIP_LENGTH = 77
T5_LENGTH = 512  # FLUX's longest instruction

# Words that open an instruction; T5, which keeps case, has them capitalised too.
_VERBS = """
add adjust apply blur brighten bring change clean clear colour color convert crop cut darken delete draw edit enlarge
erase extend fill fix flip give have hide insert keep let lighten lower make modify move open paint place please put
raise recolour recolor remove render repaint replace resize restore rotate set shift show shrink style swap switch take
transform translate turn use write
get above at below in on to
"""
_WORDS = """
the a an and or but not no so as if then than with without to of in into inside on onto over under above below behind
beside between near next by at for from off out outside up down around across along through while only all both each
every other another same one two three four five six seven eight nine ten it its this that these those there they them
their he she his her him you your i my we is are be was were been has had do does should must can more less most very
much many some any again also still just like look looks looking make made

red orange yellow green blue purple violet pink brown black white grey gray gold golden silver cyan magenta teal navy
maroon beige turquoise dark light bright pale deep vivid colourful colorful transparent colours colors

circle disc disk square triangle rectangle ellipse oval star cross ring diamond heart hexagon pentagon cube ball sphere
box cone cylinder pyramid line dot stripe shape shapes pattern edge corner border frame area region mask

big bigger small smaller large larger little tiny huge tall short long wide thin thick round flat straight new old young
first second last left right top bottom middle centre center upper side front back half whole full empty single double
wooden metal glass plastic stone leather striped dotted spotted checkered smooth rough shiny matte soft hard wet dry
medium sized away rid cloudy blotchy
hot cold warm cool open closed happy sad smiling realistic natural modern vintage beautiful

image picture photo photograph background foreground object objects scene part color texture material shadow
reflection lighting contrast text word words letter letters number sign logo title style painting drawing sketch cartoon
person people man men woman women boy girl child children baby face head hair eye eyes mouth nose hand hands arm leg
shirt dress hat cap coat jacket shoe shoes glasses bag watch clothes skirt pants tie scarf
cat dog bird fish horse cow sheep bear elephant lion tiger rabbit butterfly animal
tree trees flower flowers grass leaf leaves plant forest field mountain hill river lake sea ocean beach sand snow rain
sky cloud clouds sun moon stars night day sunset sunrise winter summer autumn spring fire water ice smoke rock road
street city house building window door wall roof floor room kitchen garden park bridge fence car cars truck bus bike
bicycle train boat ship plane table chair sofa bed lamp desk shelf book cup bottle plate bowl glass fruit apple banana
lemon cake pizza bread food phone computer screen clock umbrella balloon toy kite guitar
watercolor oil pencil anime pixel art
"""
_T5_SUFFIXES = ("'s", "es", "ed", "ing", "er", "est", "ly", "ish")

# T5's single characters, code points inclusive: Latin with its accents, Greek, Cyrillic, dashes and quotation marks.
# The rest of Unicode is <unk>, as most of it is to FLUX's own T5; transformers' T5 class has no byte fallback.
_T5_CHARACTERS = ((0x21, 0x7E), (0xA1, 0x17F), (0x300, 0x45F), (0x2010, 0x2027), (0x20AC, 0x20AC))


@dataclass(frozen=True)
class Tokenizers:
    """The `tokenizer/` and `tokenizer_2/` of a FLUX folder.

    Attributes:
        clip: CLIP's.
        t5: T5's.
        lock: Held while they are called: a call sets how the tokenizer pads and cuts, for all threads.
        unspelt: Texts that T5 cannot spell, and that a warning has named.
    """

    clip: CLIPTokenizer
    t5: T5TokenizerFast
    lock: Lock = field(default_factory=Lock, repr=False)
    unspelt: set[str] = field(default_factory=set, repr=False)


class TextTokens(NamedTuple):
    """The ids of P instructions, both padded to their full length.

    Attributes:
        clip: `[P, 77]` int32, `<|startoftext|> ... <|endoftext|>`, then padding.
        t5: `[P, N_txt]` int32, `... </s>`, then padding.
        t5_lengths: `[P]` int32 in `1 .. N_txt`, the number of T5 tokens that are not padding, with `</s>`.
    """

    clip: Int[np.ndarray, "P 77"]
    t5: Int[np.ndarray, "P N_txt"]
    t5_lengths: Int[np.ndarray, " P"]


def tokenize(tokenizers: Tokenizers, instructions: Sequence[str], max_text_tokens: int) -> TextTokens:
    """The ids that FLUX's two text encoders read, as diffusers' `FluxKontextPipeline` makes them.

    T5 reads the first `max_text_tokens - 1` tokens of an instruction and `</s>`; a warning tells of each instruction
    that is longer. Another tells, once, of each with characters that T5 has no tokens for, as those of most scripts:
    what stands in their place is one and the same `<unk>`. CLIP spells any text in bytes, and cuts at 77
    without a word: FLUX takes from it only a summary of the instruction.

    Args:
        tokenizers: Of the same folder as the text encoders.
        instructions: P editing instructions.
        max_text_tokens: N_txt, the length of the T5 sequence; at most 512 for FLUX.

    Returns:
        The ids of both and the lengths of T5's.
    """
    texts = list(instructions)
    with tokenizers.lock:
        clip = tokenizers.clip(texts, padding="max_length", max_length=CLIP_LENGTH, truncation=True)
        t5 = tokenizers.t5(texts, padding="max_length", max_length=max_text_tokens, truncation=True)
        whole = tokenizers.t5(texts, verbose=False)  # transformers' own warning would name its limit, not ours
        for text, ids in dict(zip(texts, whole["input_ids"], strict=True)).items():
            _warn(tokenizers, text, ids, max_text_tokens)
    return TextTokens(
        clip=np.asarray(clip["input_ids"], np.int32),
        t5=np.asarray(t5["input_ids"], np.int32),
        t5_lengths=np.sum(t5["attention_mask"], axis=-1, dtype=np.int32),
    )


def _warn(tokenizers: Tokenizers, text: str, ids: Sequence[int], max_text_tokens: int) -> None:
    """Warns of a text that T5 cannot spell, once, or does not read to its end."""
    shown = textwrap.shorten(text, 80, placeholder=" ...")
    unknown = ids.count(tokenizers.t5.unk_token_id)
    if unknown and text not in tokenizers.unspelt:
        tokenizers.unspelt.add(text)
        logger.warning(
            "T5 cannot spell an instruction; unknown to it, and read as nothing, are %d of %d tokens (%.0f %%): %r",
            unknown, len(ids) - 1, 100 * unknown / (len(ids) - 1), shown,
        )  # fmt: skip
    if len(ids) > max_text_tokens:
        logger.warning(
            "An instruction of %d T5 tokens is cut to max_text_tokens = %d; the rest is ignored: %r",
            len(ids), max_text_tokens, shown,
        )  # fmt: skip


def load_tokenizers(folder: Path) -> Tokenizers:
    """Both tokenizers of a diffusers folder (`tokenizer/`, `tokenizer_2/`).

    Raises:
        UserError: For a missing folder, and missing or unreadable files.
    """
    return Tokenizers(load_clip_tokenizer(Path(folder) / "tokenizer"), load_t5_tokenizer(Path(folder) / "tokenizer_2"))


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """The CLIP tokenizer of `folder`: `vocab.json` and `merges.txt`, or `tokenizer.json`."""
    return _load("CLIPTokenizer", folder, [("vocab.json", "merges.txt"), ("tokenizer.json",)])


def load_t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """The T5 tokenizer of `folder`: `tokenizer.json`, or `spiece.model`, which needs sentencepiece and protobuf."""
    return _load("T5TokenizerFast", folder, [("tokenizer.json",), ("spiece.model",)])


def check_files(folder: Path) -> None:
    """Refuses a tokenizer's files that are of another kind, and settings and numbers that are out of range.

    Raises:
        UserError: With the file's name and kind, or the field's.
    """
    for file in (file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".txt", ".model")):
        if kind := describe(file):  # none of a tokenizer's files is of a kind that is known by its first bytes
            remedy = LFS_REMEDY if kind == LFS_POINTER else "Download the folder's files again."
            raise UserError(f"{file}: {kind}, not the file of a tokenizer.", remedy)
    TokenizerSettings.read(folder)
    if (vocabulary := folder / "vocab.json").is_file():  # tokens without a number would be left out in silence
        conform(
            read_object(vocabulary, COPY_SETTINGS), dict[str, Annotated[int, Ge(0)]], f"{vocabulary}", COPY_SETTINGS
        )


def _load(class_name: str, folder: Path, alternatives: Sequence[tuple[str, ...]]) -> Any:
    """Loads a tokenizer once its files are known to be there: without them transformers makes an empty one up."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    import transformers

    wanted = ", or ".join(" and ".join(names) for names in alternatives)
    if not any(all((folder / name).is_file() for name in names) for names in alternatives):
        found = ", ".join(sorted(file.name for file in folder.iterdir())) if folder.is_dir() else "no such folder"
        raise UserError(
            f"{folder}: no tokenizer; found {found or 'nothing'}; wanted {wanted}.",
            f"Copy the {folder.name} folder of the model's release to {folder}.",
        )
    check_files(folder)
    try:
        # FLUX's CLIP folder asks for a clean-up of decoded text that transformers refuses, with a warning.
        found = getattr(transformers, class_name).from_pretrained(
            folder, local_files_only=True, clean_up_tokenization_spaces=False
        )
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(
            f"{folder}: not readable as a {class_name} ({reason(error)}); wanted {wanted}.",
            "Download the folder's files again; a spiece.model alone also needs `pip install sentencepiece protobuf`.",
        ) from error
    if found.pad_token is None:
        raise UserError(f"{folder}: the tokenizer has no pad_token.", COPY_SETTINGS)
    return found


def write_clip_tokenizer(folder: Path) -> int:
    """Writes a small CLIP tokenizer: lower-case, byte-level, every word of the lists a single token.

    Its ids are ordered as CLIP's: 256 bytes, 256 bytes that end a word, merges, `<|startoftext|>`, `<|endoftext|>`.

    Args:
        folder: The `tokenizer/` folder to write.

    Returns:
        The size of the vocabulary; the end-of-text token is its last id.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    start, end = "<|startoftext|>", "<|endoftext|>"
    alphabet = sorted(ByteLevel.alphabet())
    merges = _merges((_VERBS + _WORDS).split())
    tokens = [*alphabet, *(byte + "</w>" for byte in alphabet), *map("".join, merges), start, end]
    special = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges), ""]), encoding="utf-8")
    _write_config(folder, special, tokenizer_class="CLIPTokenizer", model_max_length=CLIP_LENGTH)
    return len(tokens)


def write_t5_tokenizer(folder: Path, length: int = T5_LENGTH) -> int:
    """Writes a small T5 tokenizer: words of the lists, common suffixes, and the characters of European scripts.

    Ids are `<pad>`, `</s>`, `<unk>`, then pieces. FLUX never uses T5's sentinels (`<extra_id_0>`, ...): there are none.

    Args:
        folder: The `tokenizer_2/` folder to write.
        length: That its model pads sequences to.

    Returns:
        The size of the vocabulary.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    verbs, words = _VERBS.split(), _WORDS.split()
    pieces = [*("▁" + word for word in [*verbs, *words, *map(str.capitalize, verbs)]), *_T5_SUFFIXES]
    characters = ["▁", *(chr(code) for first, last in _T5_CHARACTERS for code in range(first, last + 1))]
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    # Log-probabilities: any piece beats the characters it is made of, and few pieces beat many.
    scores = dict.fromkeys(special.values(), 0.0) | dict.fromkeys(pieces, -8.0) | dict.fromkeys(characters, -12.0)

    model = Tokenizer(models.Unigram(list(scores.items()), unk_id=2))
    model.add_special_tokens(list(special.values()))
    metaspace = dict(replacement="▁", prepend_scheme="always")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**metaspace)]
    )
    model.decoder = decoders.Metaspace(**metaspace)
    model.post_processor = processors.TemplateProcessing(
        single=["$A", "</s>"], pair=["$A", "</s>", "$B", "</s>"], special_tokens=[("</s>", 1)]
    )
    _write_json(folder / "tokenizer.json", json.loads(model.to_str()))
    _write_config(folder, special, tokenizer_class="T5Tokenizer", model_max_length=length, extra_ids=0)
    return len(scores)


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Ranked BPE merges under which every one of `words` becomes a single token.

    A word is first merged as the earlier words allow; what is left is joined from the left by new merges. They rank
    behind all others, and BPE applies the lowest rank first, so they change nothing for the earlier words.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = min(pairwise(pieces), key=lambda pair: ranks.get(pair, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            at = 0
            while at < len(pieces) - 1:
                if (pieces[at], pieces[at + 1]) == pair:
                    pieces[at : at + 2] = ["".join(pair)]
                at += 1
    return list(ranks)


def _write_config(folder: Path, special: dict[str, str], **config: Any) -> None:
    """Writes the two files that name a tokenizer's class, length and special tokens."""
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(folder / "tokenizer_config.json", {**config, **special, "clean_up_tokenization_spaces": False})


def _write_json(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
