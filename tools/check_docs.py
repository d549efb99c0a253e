"""Looks at every page of `_docs/` in a headless Chromium, at desk and at phone width: `python tools/check_docs.py [pages ...]`.

It reports links that lead nowhere, errors on the console, requests to another host, and clipped lines: an element whose text is wider
than the element, where no scroll bar of its own lets a reader see the rest. `--shots FOLDER` also leaves pictures of the named pages."""
import http.server
import re
import shutil
import sys
import threading
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SITE = ROOT / "_docs"
WIDTHS = {"desk": (1300, 900), "phone": (390, 844)}
SCHEMES = {"http", "https", "mailto"}

# elements that are wider inside than outside, without a scroll bar of their own or of something around them
CLIPPED = """() => {
  const rolls = e => { for (; e && e !== document.body; e = e.parentElement) {
    const x = getComputedStyle(e).overflowX; if (x === 'auto' || x === 'scroll') return true } return false };
  const found = [];
  for (const e of document.querySelectorAll('.md-content *, .md-content')) {
    const box = e.getBoundingClientRect();
    if (!box.width || !box.height || e.closest('svg, math, button, clipboard-copy, .headerlink, [hidden]')) continue;
    const style = getComputedStyle(e);
    if (style.position === 'absolute' || style.display === 'inline') continue;
    if (e.scrollWidth > e.clientWidth + 1 && e.clientWidth && !rolls(e)) found.push(e);
  }
  const inner = found.filter(e => !found.some(other => other !== e && e.contains(other)));
  const said = inner.map(e => `${e.tagName.toLowerCase()}.${e.className}: ${e.textContent.trim().slice(0, 60)}`);
  const page = document.documentElement;
  if (page.scrollWidth > page.clientWidth + 1) said.push(`the page is ${page.scrollWidth} wide`);
  return said;
}"""


class Links(HTMLParser):
    "What a page points to, and the ids that one may point to on it"

    def __init__(self):
        super().__init__()
        self.to, self.ids = [], {""}

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.to += [attrs[k] for k in ("href", "src") if attrs.get(k)]


def read(page):
    found = Links()
    found.feed(page.read_text(encoding="utf8"))
    return found


def broken_links(site):
    "Sentences on links between pages that lead to no page, or to no place on it"
    pages = {p.relative_to(site).as_posix(): read(p) for p in sorted(site.rglob("*.html"))}
    for name, page in pages.items():
        if name == "404.html": continue  # served from anywhere, it points from the root
        for link in dict.fromkeys(page.to):
            parts = urlsplit(link)
            if parts.scheme in SCHEMES | {"data", "javascript"}: continue
            target = unquote(urlsplit(urljoin(f"http://x/{name}", link)).path).lstrip("/")
            target += "index.html" if not target or target.endswith("/") else ""
            if not (site / target).is_file():
                yield f"{name}: {link} leads nowhere"
            elif target in pages and parts.fragment and unquote(parts.fragment) not in pages[target].ids:
                yield f"{name}: {link} names no place on {target}"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


def looked_at(site, pages, widths=WIDTHS, shots=None):
    "Sentences on what a browser sees wrong"
    from playwright.sync_api import sync_playwright
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not chromium: sys.exit("no Chromium on this machine (Debian: apt install chromium)")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f"http://127.0.0.1:{server.server_port}/"
    said = []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width, (w, h) in widths.items():
            page, at = browser.new_page(viewport={"width": w, "height": h}), {"page": ""}
            page.on("console", lambda m: m.type == "error" and said.append(f"{at['page']} ({width}): console: {m.text[:200]}"))
            page.on("pageerror", lambda e: said.append(f"{at['page']} ({width}): script: {str(e)[:200]}"))
            page.on("request", lambda r: r.url.startswith((home, "data:", "blob:")) or said.append(f"{at['page']} ({width}): asks {r.url}"))
            for name in pages:
                at["page"] = name
                page.goto(home + name, wait_until="load", timeout=60_000)
                said += [f"{name} ({width}): clipped: {line}" for line in page.evaluate(CLIPPED)]
                if shots: page.screenshot(path=str(Path(shots) / f"{re.sub(r'[/.]', '-', name)}-{width}.png"))
        browser.close()
    server.shutdown()
    return list(dict.fromkeys(said))


def found(site):
    "The page count and every sentence"
    pages = sorted(p.relative_to(site).as_posix() for p in site.rglob("*.html"))
    return len(pages), [*broken_links(site), *looked_at(site, pages)]


if __name__ == "__main__":
    args = sys.argv[1:]
    shots = args.pop(args.index("--shots") + 1) if "--shots" in args else None
    if not (SITE / "index.html").exists(): sys.exit("there is no _docs/index.html: run make docs")
    if shots: Path(shots).mkdir(parents=True, exist_ok=True)
    if named := [a for a in args if a != "--shots"]: count, wrong = len(named), looked_at(SITE, named, shots=shots)
    else: count, wrong = found(SITE)
    print("\n".join(wrong) or f"{count} pages, at {' and '.join(WIDTHS)} width: no broken link, no error, no clipped line, no other host")
    sys.exit(bool(wrong))
