"""Flow transformers without a download: their weights by published key and shape, at a small width."""


def _linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _mlp(name, inputs, width):
    return _linear(f"{name}.in_layer", inputs, width) | _linear(f"{name}.out_layer", width, width)


def flux_shapes(text, pooled, width=128, double=1, single=1):
    """Flux.1 dev, as in a file that holds the network alone."""
    norms = {f"norm.{part}_norm.scale": (128,) for part in ("query", "key")}
    shapes = _linear("img_in", 64, width) | _linear("txt_in", text, width)
    shapes |= _mlp("time_in", 256, width) | _mlp("vector_in", pooled, width) | _mlp("guidance_in", 256, width)
    for block in (f"double_blocks.{i}" for i in range(double)):
        for stream in ("img", "txt"):
            name = f"{block}.{stream}"
            shapes |= _linear(f"{name}_mod.lin", width, 6 * width)
            shapes |= _linear(f"{name}_attn.qkv", width, 3 * width)
            shapes |= {f"{name}_attn.{norm}": shape for norm, shape in norms.items()}
            shapes |= _linear(f"{name}_attn.proj", width, width)
            shapes |= _linear(f"{name}_mlp.0", width, 4 * width) | _linear(f"{name}_mlp.2", 4 * width, width)
    for block in (f"single_blocks.{i}" for i in range(single)):
        shapes |= _linear(f"{block}.linear1", width, 7 * width) | _linear(
            f"{block}.linear2", 5 * width, width
        )
        shapes |= {f"{block}.{norm}": shape for norm, shape in norms.items()}
        shapes |= _linear(f"{block}.modulation.lin", width, 3 * width)
    return shapes | _linear("final_layer.linear", width, 64) | _final(width)


def _final(width):
    return _linear("final_layer.adaLN_modulation.1", width, 2 * width)


def sd3_shapes(text, pooled, depth=2, side=16):
    """Stable Diffusion 3.5 medium with two attentions in its first block, in a file of the network alone."""
    width = 64 * depth
    shapes = {"x_embedder.proj.weight": (width, 16, 2, 2), "x_embedder.proj.bias": (width,)}
    shapes |= {"pos_embed": (1, side * side, width)} | _linear("context_embedder", text, width)
    for name, inputs in (("t_embedder", 256), ("y_embedder", pooled)):
        shapes |= _linear(f"{name}.mlp.0", inputs, width) | _linear(f"{name}.mlp.2", width, width)
    for i in range(depth):
        for stream in ("context", "x"):
            name, is_last = f"joint_blocks.{i}.{stream}_block", stream == "context" and i == depth - 1
            attentions = ("attn", "attn2") if stream == "x" and i == 0 else ("attn",)
            parts = 2 if is_last else 3 + 3 * len(attentions)
            shapes |= _linear(f"{name}.adaLN_modulation.1", width, parts * width)
            for attention in (f"{name}.{part}" for part in attentions):
                shapes |= _linear(f"{attention}.qkv", width, 3 * width)
                shapes |= {f"{attention}.ln_{letter}.weight": (64,) for letter in "qk"}
                shapes |= {} if is_last else _linear(f"{attention}.proj", width, width)
            if not is_last:
                shapes |= _linear(f"{name}.mlp.fc1", width, 4 * width)
                shapes |= _linear(f"{name}.mlp.fc2", 4 * width, width)
    return shapes | _linear("final_layer.linear", width, 64) | _final(width)
