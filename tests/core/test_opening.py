"""A source is checked once, when it is opened: relatives of a family, missing parts, other layouts, damaged
values."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_layout import (
    SD2_TEXT,
    TEXT,
    UNET,
    VAE,
    XL_TEXT,
    XL_TEXT_2,
    autoencoder_shapes,
    checkpoint_shapes,
    sd2_shapes,
    text_shapes,
    unet_shapes,
    write_hollow,
    xl_shapes,
)

from cul_core.base.errors import ModelError, TrainingError
from cul_core.files.safetensors_format import read_header
from cul_core.minicanvas.family import MINI
from cul_core.models import sd_layout
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import load_network, load_tokenizer
from cul_core.models.recognize import detect_family
from cul_core.models.sampling import SamplerConfig
from cul_core.output.checkpoint import open_continued, open_model, save_checkpoint
from cul_core.store.anchors import AnchorStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step

FULL = {"sd1": checkpoint_shapes, "sd2": sd2_shapes, "sdxl": xl_shapes}


@pytest.mark.parametrize("name", FULL)
def test_shapes_from_the_arguments_are_those_of_the_published_files(name):
    family, file = FAMILIES[name], FULL[name]()
    for prefix, part, shapes in (
        (UNET, "unet", sd_layout.unet_shapes),
        (VAE, "vae", sd_layout.autoencoder_shapes),
    ):
        theirs = {key: shape for key, shape in file.items() if key.startswith(prefix)}
        assert {prefix + key: shape for key, shape in shapes(family.config(part)).items()} == theirs


def test_shapes_from_the_arguments_are_those_of_minicanvas(random_checkpoint):
    header, _, _ = read_header(random_checkpoint)
    theirs = {key: tuple(entry["shape"]) for key, entry in header.items() if key.startswith(UNET)}
    ours = sd_layout.unet_shapes(MINI.config("unet"))
    assert {UNET + key: shape for key, shape in ours.items()} == theirs


# --- relatives


def pruned(shapes, depths, without=()):
    """Shapes with so many transformer blocks in each attention, and without the keys that begin so."""

    def stays(key):
        block = re.match(rf"{UNET}(\w+_blocks?\.[\d.]+?\.?1)\.", key)
        depth = depths.get(block[1]) if block else None
        number = re.search(r"transformer_blocks\.(\d+)\.", key)
        is_cut = depth == 0 or (depth is not None and number and int(number[1]) >= depth)
        return not is_cut and not key.startswith(tuple(UNET + part for part in without))

    return {key: shape for key, shape in shapes.items() if stays(key)}


def relative(inputs, outputs):
    names = {f"input_blocks.{place}.1": depth for place, depth in zip((4, 5, 7, 8), inputs, strict=True)}
    names |= {f"output_blocks.{place}.1": depth for place, depth in enumerate(outputs)}
    return pruned(xl_shapes(), names, ("middle_block.1", "middle_block.2"))


RELATIVES = {
    "SSD-1B": lambda: relative((2, 2, 4, 4), (4, 4, 10, 2, 1, 1)),
    "Segmind-Vega": lambda: relative((1, 1, 2, 2), (2, 2, 2, 1, 1, 1)),
    "base-SD": lambda: unet_shapes(blocks=1),
    "small-SD": lambda: pruned(unet_shapes(blocks=1), {}, ("middle_block",)) | text_shapes(),
    "tiny-SD": lambda: pruned(
        unet_shapes(blocks=1, multiples=(1, 2, 4), depths=(1, 1, 1)), {}, ("middle_block",)
    ),
    "LCM": lambda: checkpoint_shapes() | {f"{UNET}time_embed.cond_proj.weight": (320, 256)},
}


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_of_a_family_is_refused_by_name(name, tmp_path):
    with pytest.raises(ModelError, match=f"'a.safetensors' is .*{name}.*choose"):
        detect_family(write_hollow(tmp_path / "a.safetensors", RELATIVES[name]()))


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ({"joint_blocks.0.x": (1,)}, "Stable Diffusion 3"),
        ({"model.diffusion_model.double_blocks.0.x": (1,)}, "Flux"),
        ({"lora_unet_x.lora_up.weight": (1,)}, "a LoRA"),
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a UNet alone"),
        ({"down_blocks.0.resnets.0.norm1.weight": (1,)}, "a UNet in diffusers' layout"),
        ({"decoder.conv_in.weight": (1,)}, "a VAE alone"),
        ({"text_model.final_layer_norm.weight": (1,)}, "a text encoder alone"),
    ],
)
def test_a_file_of_another_kind_is_called_what_it_is(shapes, said, tmp_path):
    with pytest.raises(ModelError, match=f"'a.safetensors' is .*{said}.*holds no Stable Diffusion UNet"):
        detect_family(write_hollow(tmp_path / "a.safetensors", shapes))


OUT = f"{UNET}out.2.bias"
EXTRA = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.target_output"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s | {EXTRA: (4,)}, f"also has '{EXTRA}'.*Unlearn From MODEL"),
        (lambda s: {k: v for k, v in s.items() if k != OUT}, f"lacks '{OUT}'; choose a complete"),
        (lambda s: s | {OUT: (8,)}, f"'{OUT}' has the shape"),
        (lambda s: {k: v for k, v in s.items() if ".5.1." not in k}, "and .* others; choose a complete"),
    ],
    ids=["more", "less", "other shape", "many less"],
)
@pytest.mark.parametrize("name", FULL)
def test_one_unet_tensor_too_much_or_too_little_is_named(name, change, said, tmp_path):
    with pytest.raises(ModelError, match=said):
        detect_family(write_hollow(tmp_path / "a.safetensors", change(FULL[name]())))


# --- parts


def first(name):
    return {"sd1": TEXT, "sd2": SD2_TEXT, "sdxl": XL_TEXT}[name]


@pytest.mark.parametrize("name", FULL)
def test_a_lost_text_encoder_is_named_with_the_remedy(name, tmp_path):
    shapes = {key: shape for key, shape in FULL[name]().items() if not key.startswith(first(name))}
    with pytest.raises(ModelError, match="has no text encoder.*Unlearn From MODEL"):
        detect_family(write_hollow(tmp_path / "a.safetensors", shapes))


@pytest.mark.parametrize(
    ("name", "lost", "said"),
    [
        ("sd1", ".layers.11.", "of its text encoder and 15 more tensors"),
        ("sd2", ".resblocks.22.", "of its text encoder and 11 more tensors"),
        (
            "sdxl",
            XL_TEXT_2 + "text_projection",
            "'conditioner.embedders.1.model.text_projection' of its text encoder 2;",
        ),
        ("sdxl", XL_TEXT_2, "has no text encoder 2"),
        ("sdxl", XL_TEXT_2 + "ln_final.bias", "lacks '.*ln_final.bias' of its text encoder 2"),
    ],
)
def test_a_lost_part_of_a_text_encoder_is_named(name, lost, said, tmp_path):
    shapes = {key: shape for key, shape in FULL[name]().items() if lost not in key}
    with pytest.raises(ModelError, match=f"{said}.*Unlearn From MODEL"):
        detect_family(write_hollow(tmp_path / "a.safetensors", shapes))


def test_a_text_encoder_with_more_words_is_named(tmp_path):
    shapes = checkpoint_shapes() | text_shapes(words=49409)
    with pytest.raises(ModelError, match=r"token_embedding.weight' of its text encoder .*49409.*49408"):
        detect_family(write_hollow(tmp_path / "a.safetensors", shapes))


def test_what_no_family_needs_may_be_missing_or_be_there(tmp_path):
    unused = [
        key for key in sd2_shapes() if ".23." in key or key.endswith(("text_projection", "logit_scale"))
    ]
    shapes = {
        key: shape for key, shape in sd2_shapes().items() if key not in unused and not key.startswith(VAE)
    }
    assert detect_family(write_hollow(tmp_path / "a.safetensors", shapes)).name == "sd2"
    more = {"alphas_cumprod": (1000,), f"{TEXT}logit_scale": (), "lora_unet_x.alpha": (), "empty": (0, 3)}
    assert detect_family(write_hollow(tmp_path / "b.safetensors", checkpoint_shapes() | more)).name == "sd1"


@pytest.mark.parametrize("lost", ["", "quant_conv.weight", "decoder.mid.attn_1.q.weight"])
def test_a_missing_vae_is_named_before_a_picture_is_drawn(lost, tiny_checkpoints, known_tiny, tmp_path):
    vae = (
        {} if not lost else {key: torch.zeros(shape) for key, shape in autoencoder_shapes(32, (1, 1)).items()}
    )
    path = tmp_path / "a.safetensors"
    tensors = load_file(tiny_checkpoints["sdxl"]) | {k: v for k, v in vae.items() if k != VAE + lost}
    save_file(tensors, path)
    network = load_network(path)
    with pytest.raises(
        ModelError, match="'a.safetensors' (has no VAE|lacks|has the shape).*Unlearn From MODEL"
    ):
        network.check_autoencoder()


def test_a_model_without_vae_is_refused_before_its_anchors_are_drawn(
    tiny_checkpoints, known_tiny, make_request
):
    from cul_core.methods.conabl import ConAblConfig

    drawn = []
    with pytest.raises(ModelError, match="has no VAE"):
        run_step(
            open_model(tiny_checkpoints["sdxl"]),
            make_request(method=ConAblConfig(augmentations=2)),
            callbacks=Callbacks(on_anchors=lambda *done: drawn.append(done)),
        )
    assert not drawn


def test_minicanvas_without_its_vae_is_refused_from_its_header(random_checkpoint, tmp_path):
    tensors = {key: value for key, value in load_file(random_checkpoint).items() if not key.startswith(VAE)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="has no VAE"):
        detect_family(tmp_path / "a.safetensors")


def test_a_wide_dtype_is_not_called_too_narrow(random_checkpoint, tmp_path):
    tensors = {k: v.double() if k == OUT else v for k, v in load_file(random_checkpoint).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="F64, which is not supported"):
        detect_family(tmp_path / "a.safetensors")


def test_a_header_that_is_too_large_is_not_called_damaged(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={"merge": "," * 1_000_001})
    with pytest.raises(ModelError, match="a header of more than.*save it again with less metadata"):
        read_header(path)


# --- layouts that the host reads


def rewritten(path, source, change):
    save_file({key: value.contiguous() for key, value in change(load_file(source)).items()}, path)
    return path


def turned(tensors, name="text_projection.weight"):
    matrix = tensors.pop(XL_TEXT_2 + "text_projection")
    return tensors | {XL_TEXT_2 + name: matrix.T.contiguous()}


def as_transformers_names_it(prefix):
    """OpenCLIP's tensors under the names of transformers, as a file of the host's own may have them."""

    def change(tensors):
        found, names = {}, {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "c_fc": "fc1", "c_proj": "fc2"}
        names |= {"attn.out_proj": "self_attn.out_proj", "transformer.resblocks": "encoder.layers"}
        names |= {
            "ln_final": "final_layer_norm",
            "positional_embedding": "embeddings.position_embedding.weight",
        }
        names |= {"token_embedding.weight": "embeddings.token_embedding.weight"}
        for key, value in tensors.items():
            inner = key.removeprefix(prefix)
            if not key.startswith(prefix) or inner in ("text_projection", "logit_scale"):
                found[key] = value
                continue
            for theirs, ours in names.items():
                inner = inner.replace(theirs, ours)
            if "in_proj_" in inner:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    name = inner.replace("attn.in_proj_", f"self_attn.{letter}_proj.")
                    found[f"{prefix}transformer.text_model.{name}"] = part
            else:
                found[f"{prefix}transformer.text_model.{inner}"] = value
        return found

    return change


def in_sgm_layout(tensors):
    return {key.replace(SD2_TEXT, "conditioner.embedders.0.model."): value for key, value in tensors.items()}


LAYOUTS = {
    "turned": ("sdxl", turned),
    "turned, below its level": ("sdxl", lambda t: turned(t, "transformer.text_projection.weight")),
    "both": (
        "sdxl",
        lambda t: t | {XL_TEXT_2 + "text_projection.weight": t[XL_TEXT_2 + "text_projection"].T},
    ),
    "transformers' names": ("sdxl", as_transformers_names_it(XL_TEXT_2)),
    "turned, transformers' names": ("sdxl", lambda t: turned(as_transformers_names_it(XL_TEXT_2)(t))),
    "transformers' names of sd2": ("sd2", as_transformers_names_it(SD2_TEXT)),
    "sd2 as sgm has it": ("sd2", in_sgm_layout),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_text_encoder_in_another_layout_is_the_same_one(layout, tiny_checkpoints, known_tiny, tmp_path):
    name, change = LAYOUTS[layout]
    source = tiny_checkpoints[name]
    network = load_network(rewritten(tmp_path / "a.safetensors", source, change))
    for ours, theirs in zip(network.text_encoders, load_network(source).text_encoders, strict=True):
        wanted = theirs.state_dict()
        assert {k: v.tolist() for k, v in ours.state_dict().items()} == {
            k: v.tolist() for k, v in wanted.items()
        }


def test_a_tokenizer_folder_of_one_file_gives_the_same_ids(clip_tokenizer, tmp_path):
    tokenizer = load_tokenizer(FAMILIES["sd1"], clip_tokenizer)
    tokenizer.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    texts = ["a cat", "Van Gogh's \u00e9toile, 1889!", "\u5317\u4eac \U0001f600"]
    again = load_tokenizer(FAMILIES["sd1"], tmp_path)
    assert again(texts).input_ids == tokenizer(texts).input_ids


@pytest.mark.parametrize("text", ["{}", "not json", json.dumps({"model": {}})])
def test_a_tokenizer_file_that_is_none_is_refused(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match="tokenizer in .*give a folder"):
        load_tokenizer(FAMILIES["sd1"], tmp_path)


# --- values


def spoiled(path, source, key, value=float("nan"), place=0):
    tensors = load_file(source)
    tensors[key].view(-1)[place] = value
    save_file(tensors, path)
    return path


LAST = f"{XL_TEXT_2}transformer.resblocks.2.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sdxl", f"{UNET}input_blocks.0.0.bias", float("nan")),
        ("sdxl", f"{UNET}output_blocks.0.1.transformer_blocks.1.attn2.to_v.weight", float("-inf")),
        ("sdxl", f"{XL_TEXT}text_model.encoder.layers.0.layer_norm1.weight", float("inf")),
        ("sdxl", f"{XL_TEXT}text_model.embeddings.position_embedding.weight", float("nan")),
        ("sdxl", LAST, float("nan")),
        ("sdxl", f"{XL_TEXT_2}text_projection", float("nan")),
        ("sd2", f"{SD2_TEXT}ln_final.bias", float("inf")),
        ("sd2", f"{UNET}time_embed.0.weight", float("nan")),
    ],
)
def test_a_value_that_a_step_uses_and_is_not_finite_is_named_before_the_anchors(
    name, key, value, tiny_checkpoints, known_tiny, make_request, tmp_path
):
    drawn, path = [], spoiled(tmp_path / "merged.safetensors", tiny_checkpoints[name], key, value, place=-1)
    with pytest.raises(ModelError, match=rf"'merged.safetensors' is damaged: '{re.escape(key)}' holds NaN"):
        run_step(open_model(path), make_request(), callbacks=Callbacks(on_anchors=lambda *d: drawn.append(d)))
    assert not drawn


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("sdxl", "model_ema.diffusion_modelout0weight"),
        ("sdxl", f"{XL_TEXT}text_model.encoder.layers.2.mlp.fc1.weight"),
        ("sdxl", f"{XL_TEXT}text_model.final_layer_norm.bias"),
        ("sdxl", f"{XL_TEXT_2}logit_scale"),
        ("sd2", f"{SD2_TEXT}transformer.resblocks.2.mlp.c_fc.weight"),
        ("sd2", f"{SD2_TEXT}text_projection"),
        ("sdxl", f"{XL_TEXT}text_model.embeddings.token_embedding.weight"),
    ],
)
def test_what_a_step_never_uses_may_hold_nan(name, key, tiny_checkpoints, known_tiny, tmp_path):
    network = load_network(spoiled(tmp_path / "a.safetensors", tiny_checkpoints[name], key))
    encoded = network.encode(["a house", "Candy Stripes"])
    assert torch.equal(
        encoded.text, load_network(tiny_checkpoints[name]).encode(["a house", "Candy Stripes"]).text
    )
    assert all(weight.isfinite().all() for weight in network.weights("all").values())


def test_a_damaged_word_is_named_where_a_prompt_uses_it(random_checkpoint, tmp_path):
    key = f"{TEXT}text_model.embeddings.token_embedding.weight"
    row = load_network(random_checkpoint).token_ids(["a cat"])[0, 2].item()
    path = spoiled(tmp_path / "a.safetensors", random_checkpoint, key, place=row * 192)
    network = load_network(path)
    assert network.encode(["a house"]).text.isfinite().all()
    with pytest.raises(ModelError, match="'a.safetensors' is damaged: 'token_embedding.weight'.*'a cat'"):
        network.encode(["a house", "a cat"])


def test_weights_too_large_for_the_precision_are_not_called_damaged(random_checkpoint, tmp_path):
    tensors = {
        key: value.float() if key == OUT else value for key, value in load_file(random_checkpoint).items()
    }
    tensors[OUT][0] = 1e6
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match=f"'{OUT}' that are too large for float16"):
        load_network(tmp_path / "a.safetensors", torch.float16)
    assert load_network(tmp_path / "a.safetensors", torch.bfloat16)


def test_anchor_pictures_that_are_not_finite_are_neither_kept_nor_taken(
    random_model, random_network, tmp_path, monkeypatch
):
    store, sampler = AnchorStore(tmp_path, every_seconds=0), SamplerConfig(steps=1)
    arguments = (random_model.source, random_network, ["a house"], 2, sampler, 0)
    with monkeypatch.context() as patched:
        patched.setattr(
            type(random_network), "predict", lambda self, latents, times, text: latents * float("nan")
        )
        with pytest.raises(TrainingError, match="Anchor picture 2 of 2 became NaN or infinite in float32"):
            store.anchor_latents(*arguments)
    assert not list(tmp_path.glob("*.safetensors"))
    good = store.anchor_latents(*arguments)
    with monkeypatch.context() as patched:  # an older version kept them
        patched.setattr("cul_core.store.anchors.is_finite", lambda latents: True)
        from cul_core.store.anchors import _AnchorFile

        (path,) = tmp_path.glob("*.safetensors")
        _AnchorFile(path, 0).write([torch.full_like(good, float("nan"))])
    assert torch.equal(AnchorStore(tmp_path).anchor_latents(*arguments), good)


# --- the source of an edited file


def test_a_renamed_source_is_found_again(random_checkpoint, make_request, tmp_path):
    source = tmp_path / "source.safetensors"
    source.write_bytes(random_checkpoint.read_bytes())
    edited, _ = run_step(open_model(source), make_request(iterations=1))
    path = save_checkpoint(edited, tmp_path / "edited.safetensors")
    renamed = source.rename(tmp_path / "other name.safetensors")
    decoy = tmp_path / "decoy.safetensors"
    decoy.write_bytes(renamed.read_bytes()[:-1] + b"\x01")
    again = open_continued(path, [path, decoy, tmp_path / "gone.safetensors", renamed])
    assert again.source.path == renamed and again.edits.keys() == edited.edits.keys()
