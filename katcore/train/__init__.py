"""One training engine over token trees: SFT, RL and distillation are objectives."""
