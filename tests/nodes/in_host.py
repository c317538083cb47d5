"""Run by the host's own Python: loads the pack as the host would and prints, as JSON, how both sides compute
the same model."""

import asyncio
import contextlib
import dataclasses
import importlib.util
import json
import sys
import tempfile
from pathlib import Path

host, pack = map(Path, sys.argv[1:3])
sys.argv = ["main.py", "--cpu", "--fp32-text-enc"]
sys.path.insert(0, str(host))

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import utils.extra_config  # noqa: E402, F401, I001  (before a dependency claims the name `utils`)
import comfy.model_management  # noqa: E402
import comfy.sd  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

spec = importlib.util.spec_from_file_location(
    "continual-unlearning", pack / "__init__.py", submodule_search_locations=[str(pack)]
)
module = importlib.util.module_from_spec(spec)
sys.modules["continual-unlearning"] = module
spec.loader.exec_module(module)
nodes = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
heavy_at_start = sorted({"diffusers"} & sys.modules.keys())

core = importlib.import_module("continual-unlearning.cul_core.models.load_diffusers")
path = importlib.import_module("continual-unlearning.cul_core.minicanvas.models").CHECKPOINT_PATH
model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path), embedding_directory=None)
network = core.load_network(path)
prompts = [
    "",
    "A cat image in Candy Stripes style.",
    "a house, very small; with words nobody taught it: zebra",
]

torch.manual_seed(0)
with torch.no_grad():
    latents, timesteps = torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    context = network.encode(prompts)
    mine = network.predict(latents, timesteps, context)
    theirs = model.model.diffusion_model(latents, timesteps.float(), context=context.text)
    texts = [clip.encode_from_tokens(clip.tokenize(prompt)) for prompt in prompts]
    pictures = vae.decode(model.model.process_latent_out(latents)).movedim(-1, 1)
    ids = [[int(token[0]) for token in clip.tokenize(prompt)["l"][0]] for prompt in prompts]

hosted, training, types, chain, parsing = (
    importlib.import_module(f"continual-unlearning.{name}")
    for name in (
        "nodes._host",
        "nodes.unlearn",
        "nodes._types",
        "cul_core.output.checkpoint",
        "cul_core.concepts.parsing",
    )
)


class FullDevice:
    """A VAE for which memory does not suffice, except in `tiles` if there are any."""

    def __init__(self, tiles=None):
        self.decode_tiled = tiles or self.decode

    def decode(self, latents, **options):
        raise torch.cuda.OutOfMemoryError("injected")


class Recorder:
    """Stands in for the bar on a node."""

    def __init__(self):
        self.pictures, self.texts = [], []

    def update(self, done, picture=None):
        self.pictures.append(picture)

    def say(self, text, now=True):
        self.texts.append(text)


loaded = types.LoadedModel(chain.open_model(path), model, clip, vae)
decoded, batches = vae.decode, []
vae.decode = lambda latent: (batches.append(len(latent)), decoded(latent))[1]
whole = hosted.preview(loaded, latents)
left = len(comfy.model_management.current_loaded_models)
tiled = hosted.preview(dataclasses.replace(loaded, vae=FullDevice(vae.decode_tiled)), latents)
targets = parsing.ConceptList(parsing.parse_requests("Candy Stripes", "style", "")[0])
watches = []
for broken in (FullDevice(), None):
    recorder, watched = Recorder(), dataclasses.replace(loaded, vae=broken)
    request = training._request(watched, targets, "plain", 0, None, None, None)
    watch = training._Watch(watched, [request], 4)
    watch._progress = recorder
    on_preview = watch.callbacks(request).on_preview
    on_preview(0, latents)
    watch._loaded = loaded  # memory suffices again
    on_preview(4, latents)
    watches.append([recorder.texts, len(recorder.pictures)])

events = []


@contextlib.contextmanager
def watched_device(release, real=hosted.training_device):
    events.append("device")
    with real(lambda: (events.append("released"), release())) as device:
        yield device


def failing_step(*_, **__):
    events.append("step")
    raise MemoryError("injected")


hosted.training_device, training.run_step = watched_device, failing_step
with tempfile.TemporaryDirectory() as folder, contextlib.suppress(MemoryError):
    training._folders.store_folder = lambda: Path(folder)
    training._forget(loaded, [request, request], 0)
    events.append("went on")

figures = {
    "failed": events,
    "batches": batches,
    "left": left,
    "tiled": max(
        abs(np.asarray(one).astype(int) - np.asarray(other)).max().item()
        for one, other in zip(whole, tiled, strict=True)
    ),
    "watches": watches,
    "nodes": len(nodes),
    "heavy_at_start": heavy_at_start,
    "unet": (mine - theirs).abs().max().item(),
    "unet_size": mine.abs().max().item(),
    "text": max(
        (text - row).abs().max().item() for text, row in zip(torch.cat(texts), context.text, strict=True)
    ),
    "picture": (pictures - network.decode(latents)).abs().max().item(),
    "same_ids": ids == network.token_ids(prompts).tolist(),
}
sys.stdout.write(f"RESULT {json.dumps(figures)}\n")
