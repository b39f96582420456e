"""Inner functions, of which no machine code is made: those that call them take them up.

numba optimises and translates each function on its own, and again within every function that calls
it. An inner function (`jit`) stays as it is written for LLVM; the outermost function, which Python
calls, is optimised and translated once, with all that it calls.

ImportError where the insides of numba are others.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.typed_passes import IRLegalization

USED = ("_optimize_final_module", "_finalize_final_module", "_finalize_dynamic_globals")
if not all(hasattr(JITCodeLibrary, name) for name in (*USED, "get_pointer_to_function", "codegen")):
    raise ImportError("numba's libraries of code are others")


class Part(JITCodeLibrary):  # type: ignore[misc]
    """Code that is linked into that of others, and never run alone."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # what numba says of a function that is not there

    @property
    def codegen(self) -> "Part":
        return self

    def set_env(self, name: str, environment: Any) -> None:
        """Nothing: only code that calls Python asks for its environment."""


@register_pass(mutates_CFG=False, analysis_only=True)
class IntoPart(LoweringPass):  # type: ignore[misc]
    """Let the code that is about to be written be a Part."""

    _name = "into_part"

    def __init__(self) -> None:
        LoweringPass.__init__(self)

    def run_pass(self, state: Any) -> bool:
        state.library = Part(state.targetctx.codegen(), state.func_id.func_qualname)
        return False


class PartCompiler(Compiler):  # type: ignore[misc]
    """numba's compiler, but for where it puts the code."""

    def define_pipelines(self) -> list[Any]:
        pipelines: list[Any] = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.add_pass_after(IntoPart, IRLegalization)
            pipeline.finalize()
        return pipelines
