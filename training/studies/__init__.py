"""What is made of finished checkpoints: analyses, sweeps, ablations, probe, bundle."""
