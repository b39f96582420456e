"""HTML pages that need no network: templates with the style that all pages share pasted in."""

from pathlib import Path

STYLE = Path(__file__).with_name("page.css")


def read_page(template: Path) -> str:
    """The text of a template, `@STYLE@` in it being the shared style."""
    style = STYLE.read_text(encoding="utf-8")
    return template.read_text(encoding="utf-8").replace("@STYLE@\n", style)
