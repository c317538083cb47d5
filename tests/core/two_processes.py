"""One step on the processes that a launcher has started; the first writes losses and edits. Not a test."""

import os
import sys

import torch
from safetensors.torch import save_file

from cul_core.concepts.concept import Concept
from cul_core.methods.conabl import ConAblConfig
from cul_core.output.checkpoint import open_model
from cul_core.parts.training_config import TrainingConfig
from cul_core.regularizers.distillation import DistillationConfig
from cul_core.regularizers.weight_anchor import L2SPConfig
from cul_core.requests.request import Request
from cul_core.store.anchors import AnchorStore
from cul_core.training.data_parallel import joined_processes
from cul_core.training.step import run_step

PARTS = {
    "plain": (),
    "penalty": (L2SPConfig(strength=300.0, anchor="start", form="penalty"),),
    "distillation": (DistillationConfig(trajectory_steps=2),),
}


def request(name, batch_size):
    return Request(
        (Concept("Lava"),),
        ConAblConfig(teacher="pretrained"),
        PARTS[name],
        TrainingConfig(iterations=2, batch_size=batch_size),
        retain=(Concept("Navy_Stripes"),),
        anchor_prompts=("A star image.", "a house"),
        anchor_count=4,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    source, out = sys.argv[1:3]
    processes, anchors = joined_processes(), AnchorStore()
    for argument in sys.argv[3:]:
        name, batch_size = argument.split(":")
        model, report = run_step(
            open_model(source), request(name, int(batch_size)), store=anchors, processes=processes
        )
        if not processes.rank:
            save_file(
                {**model.edits, "losses": torch.tensor(report.losses)},
                os.path.join(out, f"{argument}.safetensors"),
            )
    processes.close()
