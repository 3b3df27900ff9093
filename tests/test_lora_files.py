"""LoRA files: ours are right in every reader, and everybody's are right here, or refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from lora_forms import Deltas, Forms, Tensors, bfl_modules, swapped
from references import Reference, diffusers, peft, torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_lora import GRID, N_TXT, RANK4, SETS, SMALL, inputs, random_adapter, shapes, small_velocity
from torch_parity import relative_error

from rcgrpo_jax.errors import UserError
from rcgrpo_jax.models.config import MMDiTConfig
from rcgrpo_jax.models.lora import LoRAConfig, init_adapter, scale_adapter, target_kernels
from rcgrpo_jax.weights import keymap
from rcgrpo_jax.weights.load import ModelFolder
from rcgrpo_jax.weights.lora import FORMS, LORA_FILE, load_lora, load_loras, save_lora
from rcgrpo_jax.weights.lora.names import TEXT_ENCODERS
from rcgrpo_jax.weights.networks import abstract_params

WIDE = MMDiTConfig(num_layers=1, num_single_layers=1)  # FLUX's widths, which diffusers' converters take for granted


def deltas(adapter: dict, scale: float = 1.0) -> Deltas:
    """What an adapter adds to each weight, diffusers' module -> [out, in]; modules without a change are left out."""
    flat, found = flatten_dict(adapter), {}
    for path, a in flat.items():
        if path[-1] != "A":
            continue
        change = scale * np.asarray(a) @ np.asarray(flat[(*path[:-1], "B")])
        stacked = keymap.is_stacked(path)
        for layer, x in enumerate(change if stacked else [change]):
            found[keymap.diffusers_key(path[:-1], layer if stacked else None)] = x.T
    return {module: x for module, x in found.items() if x.any()}


def assert_equal(found: Deltas, wanted: Deltas, tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for module, x in wanted.items():
        np.testing.assert_allclose(found[module], x, atol=tolerance * np.abs(x).max(), err_msg=module)


def save_float32(target: Path, adapter: dict, config: LoRAConfig, params: dict, form: str = "diffusers") -> Path:
    return save_lora(target, adapter, config, params, form, "float32")


@pytest.fixture(scope="module")
def params(folder) -> dict:
    return ModelFolder(folder).load("transformer")


@pytest.fixture(scope="module")
def pipeline(folder) -> diffusers.FluxKontextPipeline:
    return diffusers.FluxKontextPipeline.from_pretrained(folder, dtype=torch.float32)


def torch_velocity(pipeline: diffusers.FluxKontextPipeline, lora: Path) -> torch.Tensor:
    """The velocity of diffusers' transformer under a LoRA file, which is unloaded again."""
    x, sigma, condition = jax.tree.map(torch.from_numpy, inputs(SMALL))
    target_ids = pipeline._prepare_latent_image_ids(1, *GRID, "cpu", torch.float32)
    pipeline.load_lora_weights(lora)
    try:
        with torch.no_grad():
            out = pipeline.transformer(
                hidden_states=torch.cat([x, condition.reference], dim=1),
                encoder_hidden_states=condition.text,
                pooled_projections=condition.pooled,
                timestep=sigma,
                img_ids=torch.cat([target_ids, target_ids + torch.tensor([1, 0, 0])]),
                txt_ids=torch.zeros(N_TXT, 3),
                guidance=condition.guidance,
            ).sample
    finally:
        pipeline.unload_lora_weights()
    return out[:, : x.shape[1]]


# Out: one strength in every reader


@pytest.mark.parametrize(
    "targets",
    [pytest.param(targets, marks=[pytest.mark.slow] * targets.startswith("attention")) for targets in SETS],
)
def test_diffusers_computes_the_same_with_an_exported_adapter(tmp_path, params, pipeline, targets):
    config = LoRAConfig(rank=4, alpha=10.0, targets=targets)
    adapter = random_adapter(params, config)
    theirs = torch_velocity(pipeline, save_float32(tmp_path, adapter, config, params).parent)
    assert relative_error(small_velocity(params, scale_adapter(adapter, config.scale)), theirs) < 1e-4
    assert relative_error(small_velocity(params, {}), theirs) > 0.01


def by_tensors_alone(file: Path, config: MMDiTConfig) -> Deltas:
    """What programs read that know nothing of metadata: the scale is alpha / r by a tensor, or else 1."""
    tensors, found = load_file(file), {}
    layers = {name: [name] for modules in bfl_modules(config).values() for name in modules} | bfl_modules(config)
    underscored = {name.replace(".", "_"): name for name in layers}
    for key, a in tensors.items():
        if (match := re.fullmatch(r"(.*)\.(lora_A|lora_down)\.weight", key)) is None:
            continue
        b = tensors[key.replace("lora_A", "lora_B").replace("lora_down", "lora_up")]
        change = float(tensors.get(f"{match[1]}.alpha", len(a))) / len(a) * b @ a
        name = re.sub(r"^(transformer\.|diffusion_model\.|lora_unet_)", "", match[1])
        modules = layers[underscored[name.replace(".", "_")]]
        sizes = [4 * config.width if m.endswith("proj_mlp") else config.width for m in modules]
        parts = np.split(change, np.cumsum(sizes)[:-1]) if len(modules) > 1 else [change]
        bfl = not key.startswith("transformer.")
        found |= {m: swapped(m, x) if bfl else x for m, x in zip(modules, parts, strict=True)}
    return {module: x for module, x in found.items() if x.any()}


@pytest.mark.parametrize("targets", [*SETS, "norm_out/linear|x_embedder"])
@pytest.mark.parametrize("form", FORMS)
def test_a_reader_of_tensors_alone_applies_what_was_trained(tmp_path, params, form, targets):
    config = LoRAConfig(4, 8.0, targets)
    adapter = random_adapter(params, config)
    file = save_float32(tmp_path, adapter, config, params, form)
    assert file.name == FORMS[form]
    assert_equal(by_tensors_alone(file, SMALL), deltas(adapter, 2.0))


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
@pytest.mark.parametrize("form", FORMS)
def test_diffusers_own_converters_read_every_form(tmp_path, form, targets):
    params, config = abstract_params("transformer", WIDE), LoRAConfig(2, 4.0, targets)
    adapter = random_adapter(params, config)
    file = save_float32(tmp_path, adapter, config, params, form)
    state, alphas, _ = diffusers.FluxKontextPipeline.lora_state_dict(
        file, return_alphas=True, return_lora_metadata=True
    )
    assert not alphas
    flat = flatten_dict(adapter)
    for path in target_kernels(params, targets):
        module = f"transformer.{keymap.diffusers_key(path, 0)}"
        a, b = (state[f"{module}.lora_{factor}.weight"].numpy() for factor in "AB")
        probe = np.random.default_rng(0).standard_normal((a.shape[1], 2), np.float32)
        ours = 2.0 * flat[(*path, "B")][0].T @ (flat[(*path, "A")][0].T @ probe)
        assert np.linalg.norm(b @ (a @ probe) - ours) < 1e-4 * np.linalg.norm(ours), module


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("targets", SETS)
def test_our_own_file_gives_the_trained_factors_back(tmp_path, params, targets, form):
    for alpha, trained in ((8.0, True), (10.0, True), (8.0, False)):
        wanted = LoRAConfig(4, alpha, targets)
        adapter = random_adapter(params, wanted) if trained else init_adapter(jax.random.key(0), params, wanted)
        loaded, config = load_lora(save_float32(tmp_path, adapter, wanted, params, form), params)
        assert shapes(loaded) == shapes(adapter)
        flat = flatten_dict(adapter)
        for path, x in flatten_dict(loaded).items():
            np.testing.assert_allclose(x, flat[path], rtol=0 if alpha == 8.0 else 1e-6)
        assert (config.rank, config.alpha) == (4, alpha)
        assert target_kernels(params, config.targets).keys() == target_kernels(params, targets).keys()


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_bfloat16_and_its_bytes_are_those_of_the_adapter(tmp_path, params, form):
    config = LoRAConfig(4, 8.0)
    files = [save_lora(tmp_path / str(i), random_adapter(params, config), config, params, form) for i in range(8)]
    assert len({file.read_bytes() for file in files}) == 1
    with safe_open(files[0], framework="np") as handle:
        assert {handle.get_slice(key).get_dtype() for key in handle.keys() if "alpha" not in key} == {"BF16"}  # noqa: SIM118
    whole = save_float32(tmp_path, random_adapter(params, config), config, params, form)
    assert files[0].stat().st_size < 0.6 * whole.stat().st_size
    loaded, found = load_lora(files[0], params)
    assert_equal(deltas(loaded, found.scale), deltas(random_adapter(params, config), 2.0), 0.02)


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path, params):
    adapter = random_adapter(params, RANK4)
    adapter["transformer_blocks"]["attn"]["to_q"]["B"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"transformer_blocks.1.attn.to_q.lora_B.weight is not finite in bfloat16"):
        save_lora(tmp_path, adapter, RANK4, params)
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_holds(tmp_path, params):
    file = save_float32(tmp_path, random_adapter(params, RANK4), RANK4, params)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    with safe_open(file, framework="np") as handle:
        header = handle.metadata()
        modules = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in handle.keys()}  # noqa: SIM118
    settings = json.loads(header["lora_adapter_metadata"])
    assert (settings["transformer.r"], settings["transformer.lora_alpha"]) == (4, 4)
    assert set(settings["transformer.target_modules"]) == modules
    assert json.loads(header["rcgrpo_jax"]) == {"rank": 4, "alpha": 10.0, "targets": "all-linear"}


# In: what programs write


def module_shapes(params: dict) -> dict[str, tuple[int, int]]:
    """diffusers' module -> [out, in]."""
    leaves = [leaf for leaf in keymap.leaves(params) if leaf.path[-1] == "kernel"]
    return {source.key.removesuffix(".weight"): leaf.tensor_shape for leaf in leaves for source in leaf.sources}


SHAPES = abstract_params("transformer", SMALL)
FOUND_FORMS = Forms(SMALL, module_shapes(SHAPES))


@pytest.mark.parametrize("form", FOUND_FORMS.all())
def test_every_form_adds_what_its_program_would_add(tmp_path, form):
    tensors, metadata, wanted = FOUND_FORMS.all()[form]()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt", **metadata})
    adapter, config = load_lora(tmp_path / "a.safetensors", SHAPES)
    assert_equal(deltas(adapter, config.scale), wanted)


@pytest.mark.parametrize(
    "name",
    [pytest.param("diffusers", marks=pytest.mark.slow), "diffusers, alphas", "settings, patterns", "settings, rslora"],
)
def test_diffusers_computes_the_same_with_their_files(tmp_path, params, pipeline, name):
    tensors, metadata, _ = FOUND_FORMS.all()[name]()
    tensors = {key: x if "alpha" in key else 0.1 * x for key, x in tensors.items()}
    save_file(tensors, tmp_path / LORA_FILE, {"format": "pt", **metadata})
    adapter, config = load_lora(tmp_path, params)
    ours = small_velocity(params, scale_adapter(adapter, config.scale))
    assert relative_error(ours, torch_velocity(pipeline, tmp_path)) < 1e-4


def test_a_file_that_diffusers_saved_is_read(tmp_path, params, pipeline):
    adapter = random_adapter(params, RANK4)
    ours = save_float32(tmp_path / "ours", adapter, RANK4, params)
    pipeline.load_lora_weights(ours.parent, adapter_name="default")
    pipeline.save_lora_weights(
        tmp_path / "theirs",
        transformer_lora_layers=peft.get_peft_model_state_dict(pipeline.transformer, adapter_name="default"),
        **Reference("diffusers.training_utils")._collate_lora_metadata({"transformer": pipeline.transformer}),
    )
    pipeline.unload_lora_weights()
    loaded, config = load_lora(tmp_path / "theirs", params)
    assert_equal(deltas(loaded, config.scale), deltas(adapter, 2.5))


def test_peft_settings_beside_the_file_give_its_strength(tmp_path):
    tensors, _, wanted = FOUND_FORMS.peft("base_model.model.{}.lora_{}.weight")
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}))
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        adapter, config = load_lora(path, SHAPES)
        assert_equal(deltas(adapter, config.scale), {m: 2.0 * x for m, x in wanted.items()})


def test_text_encoders_beside_are_named_and_left_out(tmp_path, caplog):
    tensors, metadata, _ = FOUND_FORMS.beside_text_encoders()
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    load_lora(tmp_path / "a.safetensors", SHAPES)
    assert "1 tensors of text encoders are left out (lora_te1_text_model_encoder_layers_0_mlp_fc1" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "lora_te_text_model", "lora_te2_encoder", "text_encoder.text_model", "text_encoder_2.encoder",
        "text_encoders.clip_l.transformer", "te1_text_model", "clip_g.transformer", "base_model.model.text_model",
        "lycoris_te1_text_model", "conditioner.embedders", "bundle_emb.name", "lora_t5xxl_encoder",
    ],
)  # fmt: skip
def test_text_encoders_are_known_by_all_their_names(name):
    assert TEXT_ENCODERS.match(f"{name}.0.lora_down.weight")
    assert not any(map(TEXT_ENCODERS.match, FOUND_FORMS.shapes))


def test_zeros_of_other_kinds_beside_change_nothing(tmp_path):
    tensors, metadata, wanted = FOUND_FORMS.bfl("diffusion_model.{}", "lora_down.weight", "lora_up.weight")
    tensors["diffusion_model.double_blocks.0.img_attn.proj.diff_b"] = np.zeros(128, np.float32)
    save_file(tensors, tmp_path / "a.safetensors", metadata)
    adapter, config = load_lora(tmp_path / "a.safetensors", SHAPES)
    assert_equal(deltas(adapter, config.scale), wanted)


def test_several_loras_add_up_by_their_strengths(tmp_path):
    wanted: Deltas = {}
    for name, strength in (("kohya", 0.5), ("diffusers, some blocks", -2.0)):
        tensors, metadata, changes = FOUND_FORMS.all()[name]()
        save_file(tensors, tmp_path / f"{strength}.safetensors", metadata)
        wanted |= {m: wanted.get(m, 0) + strength * x for m, x in changes.items()}
    found = load_loras([tmp_path / f"{x}.safetensors" for x in (0.5, -2.0)], [0.5, -2.0], SHAPES)
    assert_equal(deltas(found), wanted)


# In: what is refused, by name

Q0 = "transformer.transformer_blocks.0.attn.to_q"


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def replaced(**tensors: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda others: others | {f"{Q0}.lora_{factor}.weight": value for factor, value in tensors.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def added(**tensors: np.ndarray) -> Callable[[Tensors], Tensors]:
    return lambda others: others | {f"{Q0}.{name.replace('__', '.')}": value for name, value in tensors.items()}


ONES, ONE = np.ones((4, 128), np.float32), np.ones(1, np.float32)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (renamed("transformer_blocks.1.", "transformer_blocks.7."), "which is no low-rank factor of this transformer"),
        (renamed(".attn.to_q", ".attn.norm_q"), "norm_q.lora_A.weight', which is no low-rank factor"),
        (renamed("transformer.", "unknown."), "which is no low-rank factor"),
        (without(f"{Q0}.lora_B.weight"), "transformer_blocks.0.attn.to_q in .* has no B; both factors"),
        (without(f"{Q0}.lora_A.weight"), "transformer_blocks.0.attn.to_q in .* has no A; both factors"),
        (replaced(A=ONES[:, 1:]), r"to_q.A in .* has shape \[4, 127\]; \[4, 128\] was wanted"),
        (replaced(A=ONES[0]), r"to_q.A in .* has shape \[128\]"),
        (replaced(A=ONES[:0], B=ONES[:0].T.copy()), r"to_q.A in .* has shape \[0, 128\]"),
        (replaced(B=ONES[:3].T.copy()), r"to_q.B in .* has shape \[128, 3\]; \[128, 4\] was wanted"),
        (replaced(A=ONES * np.nan), "to_q.lora_A.weight in .* holds NaN or inf"),
        (replaced(B=ONES.T * np.inf), "to_q.lora_B.weight in .* holds NaN or inf"),
        (replaced(A=ONES.astype(np.int32)), "lora_A.weight in .* is I32; one of BF16, .* was wanted"),
        (lambda tensors: {}, "holds no LoRA of a transformer"),
        (added(alpha=ONE * np.nan), "to_q.alpha in .* is nan; a number above 0 was wanted"),
        (added(alpha=ONE * np.inf), "to_q.alpha in .* is inf; a number above 0 was wanted"),
        (added(alpha=ONE * 0), "to_q.alpha in .* is 0.0; a number above 0 was wanted"),
        (added(alpha=-ONE), "to_q.alpha in .* is -1.0; a number above 0 was wanted"),
        (added(alpha=ONES), r"to_q.alpha in .* has shape \[4, 128\]; one number was wanted"),
        (added(dora_scale=ONE), "to_q.dora_scale': DoRA; plain LoRA was wanted"),
        (added(lora_magnitude_vector__weight=ONE), "DoRA; plain LoRA was wanted"),
        (added(lokr_w1=ONE), "LoKr; plain LoRA was wanted"),
        (added(hada_w1_a=ONE), "LoHa; plain LoRA was wanted"),
        (added(diff_b=ONE), r"a full change of weights \(diff\); plain LoRA was wanted"),
        (added(lora_B__bias=ONE), "LoRA with a bias; plain LoRA was wanted"),
        (added(lora_mid__weight=ONES), "Tucker decomposition"),
        (
            lambda tensors: tensors | {key.removeprefix("transformer."): x for key, x in tensors.items()},
            "adapts one layer under two names",
        ),
        (
            lambda tensors: (
                tensors
                | {
                    "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": ONES,
                    "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": np.ones((384, 4), np.float32),
                }
            ),
            "adapts one layer under two names",
        ),
        (
            lambda tensors: tensors | {"double_blocks.0.img_attn.norm.query_norm.scale": ONE},
            "a control LoRA, which replaces norms",
        ),
    ],
)
def test_a_file_that_is_no_plain_lora_of_this_model_is_refused(tmp_path, spoil, message):
    tensors, _, _ = FOUND_FORMS.peft()
    save_file(spoil(tensors), tmp_path / LORA_FILE)
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path, SHAPES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"asks for DoRA \(use_dora = True\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "asks for PiSSA"),
        ({"init_lora_weights": "olora"}, "asks for OLoRA"),
        ({"init_lora_weights": None}, "init_lora_weights = None"),
        ({"peft_type": "LOKR"}, "peft_type = 'LOKR'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"an_idea_of_tomorrow": True}, "an_idea_of_tomorrow = True"),
        ({"rank_pattern": {"to_q": 8}}, "transformer_blocks.0.attn.to_q has rank 4; its settings say 8"),
        ({"rank_pattern": {"(": 8}}, "no regular expression"),
        ({"r": 8}, "has rank 4; its settings say 8"),
        ({"r": 4.0}, "r: 4.0 found, a valid integer wanted"),
        ({"r": True}, "r: True found, a valid integer wanted"),
        ({"lora_alpha": None}, "lora_alpha is null"),
        ({"lora_alpha": "8"}, "lora_alpha: '8' found, a valid number wanted"),
        ({"lora_alpha": float("nan")}, "lora_alpha: nan found, a finite number wanted"),
        ({"lora_alpha": float("inf")}, "lora_alpha: inf found, a finite number wanted"),
        ({"lora_alpha": -4}, "lora_alpha: -4 found, greater than 0 wanted"),
        ({"alpha_pattern": {"to_q": float("nan")}}, "alpha_pattern.to_q: nan found"),
        ({"alpha_pattern": [1]}, r"alpha_pattern: \[1\] found"),
        ({"use_rslora": "yes"}, "use_rslora: 'yes' found, a valid boolean wanted"),
    ],
)
def test_settings_that_are_not_done_here_are_refused_by_name(tmp_path, settings, message):
    tensors, _, _ = FOUND_FORMS.peft()
    text = json.dumps({f"transformer.{name}": x for name, x in settings.items()})
    save_file(tensors, tmp_path / LORA_FILE, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match=message):
        load_lora(tmp_path, SHAPES)


@pytest.mark.parametrize("text", ["{", "[]", "null", "[" * 100_000, json.dumps({"r": 4})])
@pytest.mark.parametrize("key", ["lora_adapter_metadata", "rcgrpo_jax"])
def test_damaged_metadata_is_refused(tmp_path, key, text):
    tensors, _, _ = FOUND_FORMS.peft()
    save_file(tensors, tmp_path / LORA_FILE, {key: text})
    with pytest.raises(UserError, match="the metadata of"):
        load_lora(tmp_path, SHAPES)


def test_two_strengths_that_contradict_each_other_are_refused(tmp_path):
    tensors, metadata, _ = FOUND_FORMS.with_settings(lambda m: 0.5, r=4, lora_alpha=2)
    save_file(tensors | {f"{Q0}.alpha": np.array(2, np.float32)}, tmp_path / "same.safetensors", metadata)
    load_lora(tmp_path / "same.safetensors", SHAPES)
    save_file(tensors | {f"{Q0}.alpha": np.array(4, np.float32)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(UserError, match=r"says two things of .*: alpha / r is 1 by its tensor, 0.5 by its sett"):
        load_lora(tmp_path / "other.safetensors", SHAPES)


def test_a_file_that_is_not_there_or_not_whole_is_refused(tmp_path):
    with pytest.raises(UserError, match=f"{LORA_FILE} does not exist"):
        load_lora(tmp_path, SHAPES)
    for name in ("a", "b"):
        save_file(FOUND_FORMS.peft()[0], tmp_path / f"{name}.safetensors")
    with pytest.raises(UserError, match=r"holds 2 files \(a.safetensors, b.safetensors\); one was wanted"):
        load_lora(tmp_path, SHAPES)
    file = tmp_path / "a.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load_lora(file, SHAPES)
    pickle = tmp_path / "pytorch_lora_weights.bin"
    pickle.write_bytes(b"")
    with pytest.raises(UserError, match="pickle"):
        load_lora(pickle, SHAPES)
