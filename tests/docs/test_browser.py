"""A real browser looks at the built site: titles, pictures, search, a phone's width, dark mode.

`make docs` builds the site and runs this file. Without a built site or without Chromium nothing is tested.
"""

import functools
import http.server
import json
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PHONE, DESK = (390, 1600), (1280, 1600)
PAGES = [
    "index",
    "getting_started",
    "concepts",
    "exact",
    "howto/certificate",
    "theory/flow_weights",
    "api/samplers",
    "gallery/index",
]

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="needs Chromium"),
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="needs the built site: make docs"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    """Serve the site on this machine."""
    handler = functools.partial(Quiet, directory=str(SITE))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def look(tmp_path, url, size, *options):
    """Open a page; return what the browser has made of it, after scripts have run."""
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--hide-scrollbars", f"--window-size={size[0]},{size[1]}", "--virtual-time-budget=8000", *options, url,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


PROBE = """<!doctype html>
<iframe id=f src="{page}" style="width:{width}px;height:1500px;border:0"></iframe><pre id=out></pre>
<script>
document.getElementById("f").onload = () => setTimeout(() => {{
  const inside = document.getElementById("f").contentDocument, root = inside.documentElement;
  if ("{theme}") root.dataset.theme = "{theme}";
  const images = [...inside.querySelectorAll("article img")];
  const count = selector => inside.querySelectorAll(selector).length;
  document.getElementById("out").textContent = JSON.stringify({{
    title: inside.title, heading: inside.querySelector("article h1")?.textContent,
    overflow: root.scrollWidth - root.clientWidth,
    background: inside.defaultView.getComputedStyle(inside.body).backgroundColor,
    broken: images.filter(image => image.complete && !image.naturalWidth).map(image => image.src),
    images: images.length, formulas: count("math"), results: count("#search-results li"),
  }});
}}, {wait});
</script>"""
"""A page that opens a page of the site in a frame of a given width, and writes down what it sees."""


def probe(tmp_path, address, page, width, theme="", wait=1500):
    """Look at a page through a frame of this width; return what was seen."""
    (SITE / "_probe.html").write_text(PROBE.format(page=page, width=width, theme=theme, wait=wait))
    try:
        seen = look(tmp_path, f"{address}/_probe.html", DESK, "--dump-dom")
    finally:
        (SITE / "_probe.html").unlink()
    found = re.search(r'<pre id="out">({.*?})</pre>', seen, flags=re.DOTALL)
    assert found, seen[-500:]
    return json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))


@pytest.mark.parametrize("page", PAGES)
def test_page_has_title_and_pictures_and_fits_a_phone(page, tmp_path, address):
    seen = probe(tmp_path, address, f"/{page}.html", PHONE[0])
    assert "scoreinfer" in seen["title"]
    assert seen["heading"]
    assert seen["broken"] == []
    assert seen["overflow"] <= 1, f"{page} is {seen['overflow']} pixels too wide for a phone"


def test_formulas_are_drawn(tmp_path, address):
    assert probe(tmp_path, address, "/theory/path_weights.html", DESK[0])["formulas"] > 10


def test_pictures_are_there(tmp_path, address):
    assert probe(tmp_path, address, "/concepts.html", DESK[0])["images"] >= 4
    assert probe(tmp_path, address, "/gallery/index.html", DESK[0])["images"] >= 3


def test_search_finds_pages(tmp_path, address):
    assert probe(tmp_path, address, "/search.html?q=certificate", DESK[0], wait=5000)["results"] >= 3


def test_dark_mode_is_dark(tmp_path, address):
    light, dark = (probe(tmp_path, address, "/index.html", DESK[0], theme)["background"] for theme in ("light", "dark"))
    brightness = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in (light, dark)]
    assert brightness[0] > 600 > 200 > brightness[1]
