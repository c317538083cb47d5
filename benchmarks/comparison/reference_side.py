"""The published code's side of a comparison: its unchanged entry point with its own arguments.

`vs_reference.py` runs it: PYTHON reference_side.py JOB.json

The interpreter needs the published code's requirements only. Everything replaced from outside is listed in
`SHIMS`, which is reported with the figures.
"""

import importlib.machinery
import importlib.util
import json
import os
import runpy
import sys
import types
from pathlib import Path

from marks import Marks

SHIMS: list[str] = []


def _empty_module(name: str, why: str, **contents) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # importlib.util.find_spec reads it
    for key, value in contents.items():
        setattr(module, key, value)
    sys.modules[name] = module
    SHIMS.append(f"{name} is an empty module: {why}")


def _not_called(*args, **kwargs):
    raise RuntimeError("this part of the published code is replaced here and should not have been called")


def _prepare_imports() -> None:
    simultaneous = "Regularizers.Simultaneous.simultaneous"
    _empty_module(
        simultaneous,
        "evaluation during training is off, and imports classifiers",
        sample_and_evaluate_ua=_not_called,
        check_early_stopping=_not_called,
    )
    if importlib.util.find_spec("openai") is None:
        _empty_module("openai", "no prompt is requested from it")
    try:
        import torchvision  # noqa: F401
    # torchvision's operators were built for another torch; the published code uses its transforms alone
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        _empty_module(
            "torchvision._meta_registrations", "its operators do not fit this torch, and none is called"
        )


def _with_steps(call, steps: int):
    def sampled(self, *args, **kwargs):
        return call(self, *args, **(kwargs | {"num_inference_steps": steps}))

    return sampled


def _shim_selft(scoring, steps: int, side: int) -> None:
    schedule, sample = scoring._create_scheduler, scoring._sample_latents_at_timestep
    if steps != 50:
        scoring._create_scheduler = lambda device: schedule(device, steps)
        SHIMS.append(f"SelFT visits {steps} states, not 50")
    if side != 64:
        scoring._sample_latents_at_timestep = lambda **given: sample(
            **(given | {"shape": [1, 4, side, side]})
        )
        SHIMS.append(f"SelFT works on latents of {side} x {side}, not 64 x 64")


def _arguments(job: dict, folder: Path) -> list[str]:
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(job["anchor_prompts"]) + "\n", encoding="utf-8")
    given = {
        "base_model_dir": job["model_folder"],
        "output_dir": folder / "out",
        "concept_type": "object",
        "anchor_target_concepts": f"{job['anchor']}+{job['target']}",
        "anchor_dataset_dirs": folder / "anchors",
        "anchor_prompt_paths": prompts,
        "num_anchor_images": job["anchors"],
        "num_anchor_prompts": len(job["anchor_prompts"]),
        "iterations": job["iterations"],
        "anchor_batch_size": job["batch_size"],
        "resolution": job["resolution"],
        "learning_rate": job["learning_rate"],
        "prior_generation_precision": "fp32",
        "seed": job["seed"],
    }
    arguments = ["--noaug"]
    if job["kind"] == "selft":
        arguments += ["--with_selft", "--selft_topk", str(job["kept_fraction"])]
    if job["kind"] == "projection":
        auxiliary = folder / "auxiliary.txt"
        auxiliary.write_text("".join(f"an image of a {name}\n" for name in job["keep"]), encoding="utf-8")
        arguments += ["--with_gradient_projection", "--auxiliary_prompts_path", str(auxiliary)]
    return arguments + [text for name, value in given.items() for text in (f"--{name}", str(value))]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    marks, folder = Marks(), Path(job["out"])
    script = Path(job["reference"]) / "UnlearningMethods" / "ConAbl" / "train_conabl.py"
    sys.path[:0] = [str(script.parent), job["reference"]]
    os.chdir(script.parent)
    _prepare_imports()
    import diffusers
    import transformers
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    from Regularizers.Projection import projection
    from Regularizers.SelFT import selft
    from Regularizers.SelFT.src import scoring
    from src import data
    from torch.optim.optimizer import register_optimizer_step_post_hook

    marks.count_calls(UNet2DConditionModel)
    register_optimizer_step_post_hook(marks.updated)
    data.generate_anchor_images_if_needed = marks.timed("anchors", data.generate_anchor_images_if_needed)
    StableDiffusionPipeline.__call__ = _with_steps(StableDiffusionPipeline.__call__, job["anchor_steps"])
    if job["anchor_steps"] != 100:
        SHIMS.append(f"anchor images take {job['anchor_steps']} sampling steps, not 100")
    if job["kind"] == "selft":
        _shim_selft(scoring, job["selft_steps"], job["resolution"] // 8)
        selft.get_selft_mask_dict = marks.timed("selft", selft.get_selft_mask_dict)
    if job["kind"] == "projection":
        projection.get_auxiliary_embeddings = marks.timed(
            "project_prepare", projection.get_auxiliary_embeddings
        )
        projection.build_orthogonal_projector = marks.timed(
            "project_prepare", projection.build_orthogonal_projector
        )
        projection.apply_gradient_projection = marks.timed(
            "project_update", projection.apply_gradient_projection
        )
    sys.argv = [str(script), *_arguments(job, folder)]
    marks.note(
        arguments=sys.argv[1:], versions={m.__name__: m.__version__ for m in (diffusers, transformers)}
    )
    marks.timed("run", runpy.run_path)(str(script), run_name="__main__")
    written = folder / "out" / "delta.bin"
    marks.note(written_bytes=written.stat().st_size)
    marks.save(Path(job["marks"]), SHIMS)


if __name__ == "__main__":
    main()
