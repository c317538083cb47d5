"""Our side of a comparison: `run_step` on the same weights, prompts and settings.

`vs_reference.py` runs it: PYTHON our_side.py JOB.json
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

from marks import Marks

from cul_core.concepts.concept import Concept
from cul_core.history.step_record import library_versions
from cul_core.methods.conabl import ConAblConfig
from cul_core.models.family import FAMILIES
from cul_core.models.load_diffusers import NetworkCache
from cul_core.models.sampling import SamplerConfig
from cul_core.output.checkpoint import open_model, save_edits
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.projection import GradientProjection, ProjectionConfig
from cul_core.regularizers.selft import SelFT, SelFTConfig
from cul_core.requests.request import Request
from cul_core.store.anchors import AnchorStore
from cul_core.training.callbacks import Callbacks
from cul_core.training.step import run_step


def _regularizers(job: dict, marks: Marks) -> tuple:
    if job["kind"] == "selft":
        SelFT.prepare_mask = marks.timed("selft", SelFT.prepare_mask)
        return (SelFTConfig(kept_fraction=job["kept_fraction"], states=job["selft_steps"]),)
    if job["kind"] == "projection":
        GradientProjection.prepare = marks.timed("project_prepare", GradientProjection.prepare)
        GradientProjection.transform_gradient = marks.timed(
            "project_update", GradientProjection.transform_gradient
        )
        GradientProjection.constrain = marks.timed("project_update", GradientProjection.constrain)
        return (ProjectionConfig(),)
    return ()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    marks = Marks()
    from diffusers import UNet2DConditionModel

    marks.count_calls(UNet2DConditionModel)
    side = job["resolution"] // 8
    shims = []
    if (side, side) != FAMILIES["sd1"].latent_shape[1:]:
        FAMILIES["sd1"] = replace(
            FAMILIES["sd1"], latent_shape=(4, side, side), image_size_px=job["resolution"]
        )
        shims.append(f"the family's latents are {side} x {side}, not 64 x 64")
    AnchorStore.anchor_latents = marks.timed("anchors", AnchorStore.anchor_latents)
    request = Request(
        concepts=(Concept(job["target"], "object", job["anchor"]),),
        method=ConAblConfig(**ConAblConfig.REFERENCE),
        regularizers=_regularizers(job, marks),
        retain=tuple(Concept(name, "object") for name in job["keep"]),
        training=TrainingConfig(
            iterations=job["iterations"],
            batch_size=job["batch_size"],
            learning_rate=job["learning_rate"],
            weight_decay=0.01,
            seed=job["seed"],
        ),
        anchor_prompts=tuple(job["anchor_prompts"]),
        anchor_count=job["anchors"],
        anchor_sampler=SamplerConfig(steps=job["anchor_steps"], guidance_scale=6.0),
    )

    def run() -> Path:
        model = open_model(job["checkpoint"])
        edited, _ = run_step(
            model,
            request,
            callbacks=Callbacks(on_progress=marks.updated),
            networks=NetworkCache(job["tokenizer"]),
        )
        return save_edits(edited, Path(job["out"]) / "edits.safetensors")

    written = marks.timed("run", run)()
    marks.note(request=request.to_json(), versions=library_versions(), written_bytes=written.stat().st_size)
    marks.save(Path(job["marks"]), shims)


if __name__ == "__main__":
    main()
