"""Memory that several sessions work with in turn, kept between their runs and given back when all is done.

ONNX Runtime gives each session an arena that keeps what it once had, which many sessions of large values cannot afford,
or none, and then the system clears every page anew: a tenth of a vision tower's time (1.32, 4,096 patches of SigLIP's
400M shape: 3.0 million page faults, and 91 thousand with one arena for all of its sessions).
"""

from functools import cache

import numpy as np
import onnxruntime as ort

from models.process_memory import trim

NEXT_POWER_OF_TWO = 0
"""How the arena grows. Source: onnxruntime's OrtArenaCfg."""
_SHARED = "session.use_env_allocators"
_SHRINKS = "memory.enable_memory_arena_shrinkage"


class SharedArena:
    """The arena, which is one in a process. Thread: any, but `give_back` is for whoever runs the sessions."""

    def __init__(self) -> None:
        from onnx import TensorProto, helper  # noqa: PLC0415 - see `models.executors.onnx.graph`

        _register()
        shape = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
        body = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "nothing", shape[:1], shape[1:])
        text = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.lend(options)
        self._nothing = ort.InferenceSession(text, options, providers=["CPUExecutionProvider"])
        self._shrinking = ort.RunOptions()
        self._shrinking.add_run_config_entry(_SHRINKS, "cpu:0")
        # What an arena asks for first it never returns: that is to be little.
        self.give_back()

    def lend(self, options: ort.SessionOptions) -> None:
        """Have sessions of these options work with it."""
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry(_SHARED, "1")

    def give_back(self) -> None:
        """Return to the system what nobody holds. ONNX Runtime does so behind a run, hence a run of nothing."""
        self._nothing.run(None, {"x": np.zeros(1, np.float32)}, self._shrinking)
        trim()


@cache
def _register() -> None:
    """Make the arena, once in a process: sessions are given it by ONNX Runtime's environment, which is one as well."""
    kind, place = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, ort.OrtMemType.DEFAULT
    growth = ort.OrtArenaCfg(0, NEXT_POWER_OF_TWO, -1, -1)
    ort.create_and_register_allocator(ort.OrtMemoryInfo("Cpu", kind, 0, place), growth)
