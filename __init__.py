"""Continual unlearning: make text-to-image models forget, request after request, without ruining the rest."""

WEB_DIRECTORY = "./nodes/web"


async def comfy_entrypoint():
    """What ComfyUI calls once to get the nodes."""
    from .nodes import extension  # not at the top: test runners import this file where there is no host

    return extension()
