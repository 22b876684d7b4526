"""Check every internal link of the built site, anchors included: python docs/_ext/check_links.py docs/_build/html."""

import sys
import urllib.parse
from html.parser import HTMLParser
from pathlib import Path

EXTERNAL = ("http:", "https:", "mailto:", "data:", "javascript:")


class Page(HTMLParser):
    """The links and the anchors of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what a tag links to, and its own anchor."""
        told = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := told.get(name))}
        self.links |= {value for name in ("href", "src") if (value := told.get(name))}


def broken_links(site: Path) -> list[str]:
    """List ``page: link`` for every link that leads nowhere."""
    found = (path for path in sorted(site.rglob("*.html")) if "_static" not in path.parts)
    pages = {path: Page(path.read_text()) for path in found}
    broken = []
    for path, page in pages.items():
        for link in sorted(page.links):
            if link.startswith(EXTERNAL) or link in ("#", ""):
                continue
            place, _, anchor = urllib.parse.unquote(link).partition("#")
            target = (path.parent / place.partition("?")[0]).resolve() if place else path
            known = pages.get(target)
            if not target.exists() or (anchor and known is not None and anchor not in known.anchors):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def main() -> None:
    """Check the site in the first argument.

    Raises:
        SystemExit: if a link is broken.
    """
    site = Path(sys.argv[1]).resolve()
    broken = broken_links(site)
    num_pages = len(list(site.rglob("*.html")))
    print(f"{num_pages} pages, {len(broken)} broken links")
    if broken:
        raise SystemExit("\n".join(broken))


if __name__ == "__main__":
    main()
