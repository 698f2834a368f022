"""Running every rank of a program in one process."""
