"""Execute the PTX that NVRTC makes of the kernels, on the CPU.

    library = ptx.compile("search", definitions, arch=90)
    library.launch(grid, block, args, shared_mem=4096, memory=arrays, seed=1)

A second opinion beside the emulator: that executes what a C++ compiler makes of the kernels' text,
this what NVIDIA's makes of it, by the definitions in the PTX ISA; they have no code in common. The
executor (`executor/`) tells when a kernel does what it may not (its opening comment says what), and
counts what was executed. `program.py` reads PTX text.
"""

from ptx.launches import Library, Profile, compile, compile_text, missing

__all__ = ["Library", "Profile", "compile", "compile_text", "missing"]
