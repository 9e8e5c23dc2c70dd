"""One module per benchmark, found by its name: each has a docstring and ``run(bench: Bench) -> Report``."""
