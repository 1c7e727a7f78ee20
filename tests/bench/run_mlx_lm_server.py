"""Contestant: `mlx_lm.server` in this process. With --blas, that is loaded before MLX: `[--blas=FILE] -- FLAG…`."""

import ctypes
import os
import sys

if __name__ == "__main__":
    ours, theirs = sys.argv[1 : sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1 :]
    for word in ours:
        ctypes.CDLL(word.removeprefix("--blas="), mode=os.RTLD_NOW | ctypes.RTLD_GLOBAL)
    from mlx_lm.server import main

    sys.argv = ["mlx_lm.server", *theirs]
    main()
