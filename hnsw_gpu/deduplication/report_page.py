"""The report of a deduplication as one page, which needs no network."""

import json
from pathlib import Path
from typing import Any

from hnsw_gpu.files import atomic_file, read_page

TEMPLATE = Path(__file__).with_suffix(".html")


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Write the page of a report (what report.json holds), atomically."""
    text = json.dumps(report, allow_nan=False)
    # nothing in a text may end the script that it lies in
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    page = read_page(TEMPLATE).replace("@REPORT@", text)
    with atomic_file(path) as file:
        file.write(page.encode())
