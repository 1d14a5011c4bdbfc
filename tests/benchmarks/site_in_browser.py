# SPDX-License-Identifier: Apache-2.0
"""Faults that only a browser sees, on every page of the built documentation, at two widths.

    make docs && python tests/benchmarks/site_in_browser.py --shots runs/site

Counts, for each page and width: messages of the console and scripts that failed, files that are not there, requests to
other hosts, elements that end beyond the page, code that is wider than its block, and tables and formulas that must be
scrolled. Needs `chromium`, and no package. `--shots FOLDER` keeps a picture of every page.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
KINDS = ["console", "missing", "foreign", "beyond", "code", "table", "formula"]

# Goes into every page before its own scripts; keeps what the console is told.
WATCH = """<script>window.faults = [];
for (const kind of ["error", "warn"]) {
  const told = console[kind];
  console[kind] = (...words) => { faults.push(words.join(" ")); told.apply(console, words); };
}
addEventListener("error", event => faults.push(event.message || event.target.src || event.target.href), true);
addEventListener("unhandledrejection", event => faults.push(String(event.reason)));
</script>"""

# Opens page after page in a frame of the wanted width, and sends what it finds.
HARNESS = r"""<!doctype html><body style="margin:0"><script>
const text = element => element.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
const name = element => `${element.tagName.toLowerCase()}.${element.className} ${text(element)}`;
const style = element => element.ownerDocument.defaultView.getComputedStyle(element);
const scrolls = element => element && element.nodeType === 1 &&
  (/auto|scroll|hidden|clip/.test(style(element).overflowX) || scrolls(element.parentElement));
const wider = element => element.scrollWidth > element.clientWidth + 1;
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style = `border:0;width:${width}px;height:2000px`;
  document.body.replaceChildren(frame);
  await new Promise(done => { frame.onload = done; frame.src = page; });
  await new Promise(done => setTimeout(done, 400));
  const view = frame.contentWindow, root = view.document;
  const all = selector => [...(root.querySelector(".md-content") || root.body).querySelectorAll(selector)];
  const beyond = element => element.getBoundingClientRect().right > width + 1 && !scrolls(element.parentElement);
  const fetched = view.performance.getEntriesByType("resource").map(entry => new URL(entry.name));
  return {page, width, height: root.documentElement.scrollHeight, console: view.faults,
    foreign: fetched.filter(url => url.host !== location.host).map(String),
    beyond: all("*").filter(beyond).map(name),
    code: all("pre > code, pre").filter(wider).map(name),
    table: all(".md-typeset__scrollwrap").filter(wider).map(name),
    formula: all(".formula").filter(wider).map(name)};
}
(async () => {
  const found = [];
  for (const [page, width] of JOBS) found.push(await look(page, width));
  await fetch("/found", {method: "POST", body: JSON.stringify(found)});
})();
</script></body>"""


class Site(SimpleHTTPRequestHandler):
    """The built site, with the watch in each page."""

    jobs: list[tuple[str, int]]
    missing: list[str]
    found: list[dict[str, Any]]
    done: threading.Event

    def do_GET(self) -> None:
        file = Path(self.translate_path(self.path.split("?")[0]))
        file = file / "index.html" if file.is_dir() else file
        if self.path == "/harness":
            self.answer(HARNESS.replace("JOBS", json.dumps(self.jobs)))
        elif file.suffix == ".html" and file.exists():
            self.answer(file.read_text(encoding="utf-8").replace("<head>", f"<head>{WATCH}", 1))
        else:
            if not file.exists() and file.name != "favicon.ico":
                self.missing.append(self.path)
            super().do_GET()

    def do_POST(self) -> None:
        self.found.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.answer("")
        self.done.set()

    def answer(self, text: str) -> None:
        """Send a page."""
        data = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


def browse(browser: str, url: str, *flags: str, done: threading.Event | None = None) -> None:
    """Open a page in a browser with an empty profile, until it ends or `done` is set."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([browser, *FLAGS, f"--user-data-dir={profile}", *flags, url], **quiet)
        try:
            if done is None:
                process.wait(60)
            elif not done.wait(300):
                raise TimeoutError("The browser gave no answer within 300 s.")
        finally:
            process.terminate()
            process.wait(10)


def check(
    site: Path, browser: str, pages: list[str], widths: list[int], shots: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Look at pages, all if none is named, at every width; returns what was found, and files that are not there."""
    pages = pages or sorted(path.parent.relative_to(site).as_posix() for path in site.rglob("index.html"))
    pages = ["/" if page == "." else f"/{page}/" for page in pages]
    jobs = [(page, width) for page in pages for width in widths]
    state = {"jobs": jobs, "missing": [], "found": [], "done": threading.Event()}
    handler = type("Handler", (Site,), state)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        home = f"http://127.0.0.1:{server.server_port}"
        browse(browser, f"{home}/harness", "--window-size=1400,2100", "--remote-debugging-port=0", done=state["done"])
        for row in state["found"] if shots else []:
            shots.mkdir(parents=True, exist_ok=True)
            file = shots / f"{row['page'].strip('/').replace('/', '-') or 'index'}-{row['width']}.png"
            size = f"--window-size={row['width']},{min(row['height'], 16000)}"
            browse(browser, home + row["page"], f"--screenshot={file}", size)
        server.shutdown()
    return state["found"], state["missing"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, default=ROOT / "site")
    parser.add_argument("--browser", default="chromium")
    parser.add_argument("--pages", nargs="+", default=[], help="Such as concepts and api/paths; the first one is `.`.")
    parser.add_argument("--widths", type=int, nargs="+", default=[1280, 390])
    parser.add_argument("--shots", type=Path)
    args = parser.parse_args()
    if not (args.site / "index.html").exists():
        parser.error(f"--site {args.site} has no index.html: build it by `make docs`.")
    if shutil.which(args.browser) is None:
        parser.error(f"--browser {args.browser} is not installed.")
    found, missing = check(args.site, args.browser, args.pages, args.widths, args.shots)
    print(f"{len({row['page'] for row in found})} pages; files that are not there: {sorted(set(missing)) or 'none'}")
    for row in found:
        for kind in KINDS:
            for fault in row.get(kind, []):
                print(f"{row['page']} at {row['width']}: {kind}: {fault}")
    print("| width | " + " | ".join(kind for kind in KINDS if kind != "missing") + " |")
    for width in args.widths:
        rows = [row for row in found if row["width"] == width]
        counts = [str(sum(len(row[kind]) for row in rows)) for kind in KINDS if kind != "missing"]
        print(f"| {width} | " + " | ".join(counts) + " |")


if __name__ == "__main__":
    main()
