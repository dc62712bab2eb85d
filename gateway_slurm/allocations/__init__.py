"""One Slurm job from submission to release, the launchers in it, and its owner. Knows no kernel and no gateway."""
