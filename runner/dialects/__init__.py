"""The three ways parents speak: routes, parsing and encoding, nothing else."""
