"""Communication: the autosp:: operators, their layouts, process groups, and lowering."""
