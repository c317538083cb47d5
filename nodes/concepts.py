"""Concept to Forget."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..cul_core.concepts.concept import KINDS
from ..cul_core.concepts.parsing import ConceptList, parse_concept, parse_keep
from ._node import UnlearningNode
from ._types import Concepts

KIND_TIP = (
    "Kind of concept. style: the image stays, without the style. object: another object takes its place. "
    "celebrity, character: a person takes its place. memorized: one image, named by its caption."
)
ANCHOR_TIP = (
    "What the target becomes. A style needs none. A celebrity or character becomes a 'person' if none is "
    "given. An object needs a common word of the same sort, such as 'horse' for 'dog'. A memorized image "
    "needs a caption in other words that does not draw it."
)
KEEP_TIP = (
    "Concepts to keep, separated by commas or line breaks: relatives of the target that matter most to you. "
    "A line may name another kind ('object: cat'). Concepts that are not listed are protected too, less "
    "surely."
)


class ConceptToForget(UnlearningNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CUL_Concept",
            display_name="Concept to Forget",
            category="unlearning",
            description="Names what one Unlearn Step forgets, what it becomes, and what must stay. Join "
            "several of these to forget them together.",
            inputs=[
                io.String.Input(
                    "target",
                    default="",
                    placeholder="Candy Stripes",
                    tooltip="Name of the concept to forget, as people write it in prompts. "
                    "Underscores count as spaces.",
                ),
                io.Combo.Input("kind", options=list(KINDS), default="style", tooltip=KIND_TIP),
                io.String.Input("anchor", default="", tooltip=ANCHOR_TIP),
                io.String.Input(
                    "keep",
                    default="",
                    multiline=True,
                    placeholder="what must stay, one per line",
                    tooltip=KEEP_TIP,
                ),
                Concepts.Input(
                    "concepts",
                    optional=True,
                    tooltip="Other concepts to forget together with this one, in one step.",
                ),
            ],
            outputs=[
                Concepts.Output(
                    display_name="concepts", tooltip="Concepts to forget and to keep, for an Unlearn Step."
                )
            ],
        )

    @classmethod
    def execute(cls, target, kind, anchor, keep, concepts=None):
        target = parse_concept(target, kind, anchor)
        target.check_forgettable()
        mine = ConceptList((target,), parse_keep(keep, target.kind))
        return io.NodeOutput(mine if concepts is None else concepts + mine)


NODES = (ConceptToForget,)
