"""Flow transformers in the real host: loaded, trained, drawn with, saved and loaded again by its own nodes.

MiniCanvas' text encoder stands in for theirs: its rows and its pooled row have 192 values.
"""

import numpy as np
import pytest
from flow_layout import flux_shapes, sd3_shapes
from graphs import CUL, MODEL, Graph
from hosts import NEWEST
from safetensors.torch import load_file
from sd_layout import write_random

from cul_core.files.safetensors_format import read_header
from cul_core.history.step_record import read_history

SHAPES = {"sd3": sd3_shapes(192, 192, side=64), "flux": flux_shapes(192, 192)}
TRAINED = {"sd3": "context_embedder.weight", "flux": "txt_in.weight"}
PREFIXES = {"sd3": "model.diffusion_model.", "flux": ""}


def sampled(graph, model, clip):
    """Id of the node that saves latents of two steps of the stock sampler."""
    prompts = [(graph.add("CLIPTextEncode", clip=clip, text=text), 0) for text in ("A cat by Van Gogh.", "")]
    empty = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    latent = graph.add(
        "KSampler",
        model=model,
        positive=prompts[0],
        negative=prompts[1],
        latent_image=(empty, 0),
        seed=5,
        steps=2,
        cfg=2.0,
        sampler_name="euler",
        scheduler="simple",
        denoise=1.0,
    )
    return graph.add("SaveLatent", samples=(latent, 0), filename_prefix=f"flow-{len(graph)}")


def latents(host, entry, node):
    (found,) = entry["outputs"][node]["latents"]
    return load_file(host.folder / "output" / found["subfolder"] / found["filename"])["latent_tensor"].numpy()


@pytest.mark.parametrize("family", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_a_flow_transformer_goes_from_its_file_through_a_step_into_files_of_the_stock_loaders(host, family):
    if host.checkout != NEWEST:
        pytest.skip("half a minute for 1024 pixels: once is enough")
    folder = host.folder / "models/diffusion_models"
    folder.mkdir(exist_ok=True)
    prefix = PREFIXES[family]
    shapes = {prefix + key: shape for key, shape in SHAPES[family].items()}
    write_random(folder / f"{family}.safetensors", shapes)
    graph = Graph()
    unet = graph.add("UNETLoader", unet_name=f"{family}.safetensors", weight_dtype="default")
    stock = graph.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    begun = graph.add("CUL_FromModel", model=(unet, 0), clip=(stock, 1))
    concept = graph.add("CUL_Concept", target="Van Gogh", kind="style", anchor="", keep="")
    training = graph.training(iterations=3, batch_size=1, anchor_count=1, anchor_steps=1, learning_rate=1e-2)
    step = graph.add(
        "CUL_UnlearnStep",
        model=(begun, CUL),
        concepts=(concept, 0),
        training=(training, 0),
        preset="plain",
        train_seed=0,
        preview_every=0,
    )
    before, after = (sampled(graph, (node, MODEL), (stock, 1)) for node in (begun, step))
    graph.add("CUL_SaveCheckpoint", model=(step, CUL), filename_prefix=f"diffusion_models/{family}-edited")
    for kind in ("diff", "lora"):
        graph.add(
            "CUL_SaveLora", model=(step, CUL), filename_prefix=f"loras/{family}-{kind}", format=kind, rank=192
        )
    entry = host.run(graph, 600)
    first, edited = latents(host, entry, before), latents(host, entry, after)
    assert np.abs(edited - first).max() > 1e-2 * np.abs(first).max()

    (saved,) = host.saved(f"diffusion_models/{family}-edited_*")
    assert [record.targets for record in read_history(saved)[0]] == [("Van Gogh",)]
    assert list(read_header(saved)[0]) == list(shapes)
    names = load_file(saved).items(), load_file(folder / f"{family}.safetensors")
    assert [name for name, tensor in names[0] if not tensor.equal(names[1][name])] == [
        prefix + TRAINED[family]
    ]

    saved.rename(folder / f"{family}-edited.safetensors")
    for kind in ("diff", "lora"):
        (file,) = host.saved(f"loras/{family}-{kind}_*")
        file.rename(host.folder / "models/loras" / f"{family}-{kind}.safetensors")
    again = Graph()
    stock = again.add("CheckpointLoaderSimple", ckpt_name="minicanvas.safetensors")
    loaders = [
        again.add("UNETLoader", unet_name=f"{family}{end}.safetensors", weight_dtype="default")
        for end in ("-edited", "")
    ]
    patched = [
        again.add(
            "LoraLoaderModelOnly",
            model=(loaders[1], 0),
            lora_name=f"{family}-{kind}.safetensors",
            strength_model=1.0,
        )
        for kind in ("diff", "lora")
    ]
    nodes = [sampled(again, (node, 0), (stock, 1)) for node in (loaders[0], *patched)]
    entry = host.run(again, 600)
    for node in nodes:
        # files are fp16; so is the network in which the host computes
        assert np.abs(latents(host, entry, node) - edited).max() < 5e-3 * np.abs(edited).max()
