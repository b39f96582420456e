"""Small kernels over the kernels' headers, for what a whole search shows too little of."""

import emulator

from hnsw_gpu.gpu import kernel_source


def compile_probe(
    headers, body: str, definitions: dict[str, int] | None = None
) -> emulator.Library:
    """The kernel `probe` in `body`, behind the headers named, in order."""
    texts = [(kernel_source.folder() / name).read_text(encoding="utf-8") for name in headers]
    lines = [line for line in "\n".join(texts).splitlines() if not line.startswith('#include "')]
    return emulator.compile("probe", definitions, source="\n".join([*lines, body]))
