"""Facts about programs that passes ask for: token axes, masks, aliasing, liveness."""
