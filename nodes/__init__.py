"""ComfyUI nodes: thin adapters around `cul_core`. Imported by the host's entry point only."""

import logging

from comfy_api.v0_0_2 import ComfyExtension, io

logger = logging.getLogger(__name__)


def node_classes() -> list[type[io.ComfyNode]]:
    """Every node of the pack, in the order in which a graph uses them."""
    from . import (
        compare,
        concepts,
        does_it_hold,
        evaluate,
        forget,
        history,
        load_model,
        merge,
        registered,
        save,
        settings,
        store,
        take_back,
        unlearn,
    )

    modules = (
        forget,
        load_model,
        concepts,
        settings,
        registered,
        unlearn,
        take_back,
        merge,
        compare,
        evaluate,
        does_it_hold,
        save,
        history,
        store,
    )
    return [node for module in modules for node in module.NODES]


class _Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return node_classes()


def extension() -> ComfyExtension:
    """The pack; the host logs only one line of an exception raised here, so the traceback is logged first."""
    try:
        from . import _folders

        _folders.register()
        node_classes()
    except Exception:
        logger.exception("Continual Unlearning could not be loaded")
        raise
    try:
        from . import _minicanvas

        _minicanvas.register()
    except Exception:  # a host that has changed underneath costs the demonstration model, not the pack
        logger.exception("MiniCanvas is not available in this version of ComfyUI")
    return _Extension()
