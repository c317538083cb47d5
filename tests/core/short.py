"""Settings that make the mechanics of a method or regularizer fast: name -> values."""

SHORT = {
    "selft": {"states": 4},
    "sculpmem": {"warm_up": 1},
    **dict.fromkeys(("esd", "distillation"), {"trajectories": 1, "trajectory_steps": 2}),
    **dict.fromkeys(("exact", "null_space"), {"made_up": 60}),
}
