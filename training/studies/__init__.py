"""Studies of finished checkpoints: analyses, sweeps, ablations, probe, bundle."""
