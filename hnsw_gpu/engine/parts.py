"""How compiled functions are made that others take up whole, so that no machine code is theirs.

numba optimises each function on its own and makes machine code of it, and does so again of all that
it calls. What here is made of an inner function is left as it was written for LLVM; the function
that calls it is optimised, once, with all that it calls.
"""

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.typed_passes import IRLegalization


class Part(JITCodeLibrary):
    """Code for linking only."""

    def _optimize_final_module(self):
        pass

    def _finalize_final_module(self):
        self._finalize_dynamic_globals()
        self._finalized = True

    def get_pointer_to_function(self, name):
        return 0  # as numba says that there is none

    @property
    def codegen(self):
        return self

    def set_env(self, name, environment):
        """Nothing: only code that calls Python has an environment to be set."""


@register_pass(mutates_CFG=False, analysis_only=True)
class IntoPart(LoweringPass):
    """Put the code that is about to be written into a `Part`."""

    _name = "into_part"

    def __init__(self):
        LoweringPass.__init__(self)

    def run_pass(self, state):
        state.library = Part(state.targetctx.codegen(), state.func_id.func_qualname)
        return False


class PartCompiler(Compiler):
    def define_pipelines(self):
        pipelines = super().define_pipelines()
        for pipeline in pipelines:
            pipeline.add_pass_after(IntoPart, IRLegalization)
            pipeline.finalize()
        return pipelines
