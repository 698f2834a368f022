"""Parts of `remat`: what may be computed again, the fast model of a step, the budget solver, writing the choice."""
