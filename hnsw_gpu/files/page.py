"""HTML pages, each one file that needs no network; `page_head.html` holds what they share."""

from pathlib import Path

HEAD = Path(__file__).with_name("page_head.html")


def read_page(template: Path) -> str:
    """The text of a template, with the shared style and script in place of @HEAD@."""
    head = HEAD.read_text(encoding="utf-8")
    return template.read_text(encoding="utf-8").replace("@HEAD@\n", head)
