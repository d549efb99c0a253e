"""The site: `python tools/docs.py` builds `_docs/` from the notebooks as they are stored, from docments and from `records/`.

Nothing is executed and nothing is fetched: maths becomes MathML here, so pages need no script for it; fonts are the reader's.
`_proc/site` holds what mkdocs reads. Links keep working: `xsa.ipynb` becomes `xsa.html`, `[name]` in backticks leads to its API page.
`make docs` installs the extra `docs` first; `python tools/check_docs.py` looks at every page in a browser."""
import html
import importlib
import inspect
import json
import re
import shutil
import sys
from dataclasses import is_dataclass
from hashlib import sha256
from os.path import normpath, relpath
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
STAGE, SITE = ROOT / "_proc" / "site", ROOT / "_docs"
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from readme import promise, reading_order, wings  # noqa: E402

PAGES = {"README.md": "index.md", "nbs/README.md": "all.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
UPSTREAM = "https://github.com/openai/parameter-golf"
OUTSIDE = r"[a-z]+:|#"


# -- links ---------------------------------------------------------------------------------------------------------

def site_page(path):
    "Page of the site for a file of the repository, both relative to their roots; None where the site has none"
    if path == "nbs/index.ipynb": return "index.html"
    if path in PAGES: return PAGES[path].replace(".md", ".html")
    if path.startswith("nbs/"): return path.removeprefix("nbs/").replace(".ipynb", ".html")
    if path in ("records", "records/"): return "records/index.html"
    if path.startswith("records/"): return path.replace(".json", ".html")
    return None


def relinked(text, source, page):
    "Markdown whose links, relative to the file `source`, lead to pages, relative to `page`"
    def link(m):
        target, hash_, anchor = m[1].partition("#")
        inside = normpath(f"{Path(source).parent}/{target}")
        to = site_page(inside)
        if to is None or not (ROOT / inside).exists():
            raise ValueError(f"{source} links to {m[1]}, which is no page of the site")
        return f"]({relpath(to, Path(page).parent)}{hash_}{anchor})"
    return re.sub(rf"\]\((?!{OUTSIDE})([^)\s]+)\)", link, text)


def named(text, names, page):
    "Markdown in which the name of a public function or class, alone in backticks, leads to its API page"
    def link(m):
        to = names.get(m[1])
        return f"[{m[0]}]({relpath(to, Path(page).parent)})" if to else m[0]
    return re.sub(r"(?<![\[`\w])`(\w+)(?:\(\))?`(?![\]`])", link, text)


# -- maths ---------------------------------------------------------------------------------------------------------

RESERVED = {"*": "&#42;", "|": "&#124;", "\\": "&#92;", "[": "&#91;", "`": "&#96;", "_": "&#95;", "~": "&#126;"}


def mathml(tex, display):
    "A formula as MathML on one line, in which markdown finds nothing to do"
    from latex2mathml.converter import convert
    made = convert(re.sub(r"\s+", " ", tex.strip()), display="block" if display else "inline")
    made = re.sub(r">([^<]+)<", lambda m: ">" + "".join(RESERVED.get(c, c) for c in m[1]) + "<", made)
    return f'\n\n<div class="formula">{made}</div>\n\n' if display else made


def with_maths(text):
    "Markdown with its formulas as MathML; code stays"
    parts = re.split(r"(\$\$.+?\$\$)", text, flags=re.S)
    out = []
    for part in parts:
        if part.startswith("$$"):
            out.append(mathml(part[2:-2], True))
            continue
        for bit in re.split(r"(```.*?```|`[^`\n]*`|(?:^    .*\n?)+)", part, flags=re.S | re.M):
            if bit.startswith(("`", "    ")): out.append(bit)
            else: out.append(re.sub(r"(?<![\\\w])\$([^$]+?)\$(?!\w)", lambda m: mathml(m[1], False), bit))
    return "".join(out)


# -- notebooks -----------------------------------------------------------------------------------------------------

def shown(cell):
    "Does a reader of the site want this cell?"
    return cell.cell_type != "code" or not re.match(r"\s*#\|\s*(hide|default_exp)\b", cell.source)


def without_widgets(cell):
    "Outputs that a page without a kernel can show"
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        data.pop("application/vnd.jupyter.widget-view+json", None)
    return cell


def notebook_page(path, names, stage=STAGE):
    "Writes a notebook to the stage: directives off, exported cells marked, maths and links as pages want them"
    source = str(path.relative_to(ROOT))
    page = site_page(source)
    nb = nbformat.read(path, as_version=4)
    module = next((m[1] for c in nb.cells if (m := re.match(r"#\|\s*default_exp\s+([\w.]+)", c.source))), "")
    nb.cells = [without_widgets(c) for c in nb.cells if shown(c)]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            text = named(relinked(cell.source, source, page), names, page)
            cell.source = with_maths(text)
        elif cell.cell_type == "code":
            if re.search(r"^#\|\s*exporti?\b", cell.source, re.M): cell.metadata["tags"] = ["exported"]
            cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    nb.cells = [c for c in nb.cells if c.source.strip()]
    api = f"api/{module}.html"
    if any(to.startswith(f"{api}#") for to in names.values()):
        nb.cells.insert(1, nbformat.v4.new_markdown_cell(f"Module `pgolf.{module}` · [API]({relpath(api, Path(page).parent)})"))
    target = stage / source.removeprefix("nbs/")
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nb, target)
    return source.removeprefix("nbs/")


# -- API -----------------------------------------------------------------------------------------------------------

def own_names(module):
    "Public functions and classes that a module defines itself"
    found = ((n, getattr(module, n, None)) for n in getattr(module, "__all__", []))
    return [(n, v) for n, v in found if (inspect.isfunction(v) or inspect.isclass(v)) and v.__module__ == module.__name__]


def cell_text(text):
    "Text for a cell of a table"
    return html.escape(str(text), quote=False).replace("|", "&#124;").replace("\n", " ").replace("_", "&#95;").replace("*", "&#42;")


def code_text(text):
    "Code for a cell of a table"
    return f"<code>{cell_text(text)}</code>"


def type_name(kind):
    "A type as one writes it"
    if kind in (None, inspect.Parameter.empty): return ""
    if isinstance(kind, type) and not getattr(kind, "__args__", None): return kind.__name__
    return re.sub(r"\b(?:[a-z_]\w*\.)+", "", str(kind))


def default_text(value):
    "A default as one writes it, '' where there is none"
    empty = inspect.Parameter.empty
    return "" if value is empty else getattr(value, "__name__", None) or repr(value) if len(repr(value)) < 60 else "..."


def docments_table(thing):
    "Parameters and result of a function, or fields of a dataclass, from the comments beside them"
    from fastcore.docments import docments
    try: found = docments(thing, full=True, returns=True)
    except (TypeError, ValueError, AttributeError): return ""
    rows = []
    for name, doc in found.items():
        if name in ("self", "cls"): continue
        kind, default = type_name(doc["anno"]), default_text(doc["default"])
        if name == "return":
            if not (doc["docment"] or kind): continue
            name, default = "**returns**", ""
        else: name = code_text(name)
        cells = [name, code_text(kind) if kind else "", code_text(default) if default else "", cell_text(doc["docment"] or "")]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(["| | type | default | meaning, shape, unit |", "|---|---|---|---|", *rows]) if rows else ""


def settings_table(cls):
    "Fields of a Settings class, from the line beside each"
    from pgolf.ground.settings import settings_rows
    if not is_dataclass(cls): return ""
    rows = [f"| {code_text(n)} | {code_text(d)} | {cell_text(m)} | {cell_text(a)} |" for n, d, m, a in settings_rows(cls)]
    return "\n".join(["| field | default | meaning, unit | allowed |", "|---|---|---|---|", *rows]) if rows else ""


def signature_block(name, thing):
    "Name and parameters as code"
    try: parameters = list(inspect.signature(thing).parameters.values())
    except (TypeError, ValueError): return ""
    words = [p.name if p.default is p.empty else f"{p.name}={default_text(p.default)}" for p in parameters]
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    words = [stars.get(p.kind, "") + w for p, w in zip(parameters, words)]
    line = f"{name}({', '.join(words)})"
    if len(line) > 70: line = f"{name}(\n    " + ",\n    ".join(words) + ")"
    return f"```python\n{line}\n```"


def docstring(thing):
    "The docstring that is its own, safe for markdown"
    text = inspect.cleandoc(thing.__dict__.get("__doc__") or "") if isinstance(thing, type) else inspect.getdoc(thing) or ""
    return html.escape(text, quote=False).replace("*", "\\*").replace("_", "\\_") if "`" not in text else text


def class_page(cls):
    "Docstring, source, fields and methods of a class"
    from pgolf.ground.settings import Settings
    lines = [docstring(cls), ""]
    if source := getattr(cls, "source", ""):
        number = re.search(r"/pull/(\d+)$", source)
        lines += [f"From [{'PR ' + number[1] if number else source}]({source}).", ""]
    if issubclass(cls, Settings): lines += [settings_table(cls), ""]
    else: lines += [docments_table(cls), ""]
    for name, method in vars(cls).items():
        function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__: continue
        lines += [f"#### `{cls.__name__}.{name}` {{ #{cls.__name__}.{name} }}", "", docstring(function), "", docments_table(function), ""]
    return lines


def api_page(module, room):
    "The API page of one module, as markdown"
    dotted = module.__name__
    lines = [f"# `{dotted}`", "", f"> {(module.__doc__ or '').strip()}", "",
             f"Made from [{promise(room)[0]}]({relpath(site_page(str(room.relative_to(ROOT))), 'api')}), where it is developed and tested.", ""]
    for name, thing in own_names(module):
        lines += [f"## `{name}` {{ #{name} }}", "", signature_block(name, thing), ""]
        lines += class_page(thing) if isinstance(thing, type) else [docstring(thing), "", docments_table(thing), ""]
    return "\n".join(lines)


def modules():
    "(dotted name below pgolf, notebook) of every module that a wing's room exports, in reading order"
    for folder in wings():
        for room in reading_order(folder):
            m = re.search(r'#\|\s*default_exp\s+([\w.]+)', room.read_text(encoding="utf8"))
            if m: yield m[1].replace("\\n", ""), room


def api_names():
    "name -> page and anchor, for names that only one module has"
    found = {}
    for dotted, _ in modules():
        for name, _ in own_names(importlib.import_module(f"pgolf.{dotted}")):
            found.setdefault(name, []).append(f"api/{dotted}.html#{name}")
    return {name: pages[0] for name, pages in found.items() if len(pages) == 1}


def api_pages(stage=STAGE):
    "Writes all API pages and their index; (wing's title, [(dotted, file)])"
    (stage / "api").mkdir(parents=True, exist_ok=True)
    groups, index = {}, ["# API", "", "> Every public name of the package, from the comments beside its parameters.", ""]
    for folder in wings():
        groups[folder.name] = []
        index += [f"## {promise(folder / 'index.ipynb')[0]}", "", "| module | names |", "|---|---|"]
        for dotted, room in modules():
            if room.parent != folder: continue
            module = importlib.import_module(f"pgolf.{dotted}")
            names = own_names(module)
            if not names: continue
            (stage / "api" / f"{dotted}.md").write_text(api_page(module, room), encoding="utf8")
            groups[folder.name].append({dotted: f"api/{dotted}.md"})
            links = ", ".join(f"[`{n}`]({dotted}.md#{n})" for n, _ in names)
            index.append(f"| [`{dotted}`]({dotted}.md) | {links} |")
        index.append("")
    (stage / "api" / "index.md").write_text("\n".join(index), encoding="utf8")
    return groups


# -- records -------------------------------------------------------------------------------------------------------

def scalar(value):
    "A value for a cell of a table"
    if isinstance(value, float): return f"{value:.6g}"
    if isinstance(value, (list, tuple)): return ", ".join(map(scalar, value))
    return cell_text(value)


def is_plain(value):
    "Does it fit a cell?"
    if isinstance(value, list): return len(value) <= 8 and all(map(is_plain, value)) and len(json.dumps(value)) < 300
    return not isinstance(value, dict)


def table(head, rows):
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in rows), ""]


def record_lines(value, level=2):
    "A record as tables where it has their shape, as JSON where it has not"
    plain = {k: v for k, v in value.items() if is_plain(v)}
    lines = table(["", "value"], [[code_text(k), scalar(v)] for k, v in plain.items()]) if plain else []
    for key, inner in value.items():
        if key in plain: continue
        lines += [f"{'#' * level} {key.replace('_', ' ')}", ""]
        rows = inner if isinstance(inner, list) else list(inner.values())
        columns = list(dict.fromkeys(c for r in rows if isinstance(r, dict) for c in r))
        if rows and all(isinstance(r, dict) and all(map(is_plain, r.values())) for r in rows) and len(columns) <= 9:
            named_rows = enumerate(inner) if isinstance(inner, list) else inner.items()
            lines += table(["", *columns], [[code_text(k), *(scalar(r.get(c, "")) for c in columns)] for k, r in named_rows])
        elif isinstance(inner, dict) and level < 4: lines += record_lines(inner, level + 1)
        else: lines += ["```json", json.dumps(inner, indent=1)[:20_000], "```", ""]
    return lines


MADE_BY = {"tiny": "nbs/runs/record.ipynb", "tiny-audit": "nbs/runs/record.ipynb", "compare_web": "nbs/runs/compare.ipynb",
           **dict.fromkeys(("ablation_pr2014", "ablation_pr2135", "search", "search_again", "search_long", "search_wide", "hint_orders", "ablation_softcap"),
                           "nbs/runs/ablation.ipynb")}


def record_pages(stage=STAGE):
    "Writes a page for every record, with the JSON itself beside it"
    (stage / "records").mkdir(parents=True, exist_ok=True)
    index, nav = ["# Records", "", "> What runs left, file by file; every figure of the book is read from here or computed.", ""], []
    rows = []
    for path in sorted((ROOT / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf8"))
        run = ROOT / MADE_BY.get(path.stem, f"nbs/runs/{path.stem}.ipynb")
        by = f"[{promise(run)[0]}]({relpath(site_page(str(run.relative_to(ROOT))), 'records')})" if run.exists() else ""
        lines = [f"# {path.stem}", "", f"> {promise(run)[1] if run.exists() else 'A record of a run.'}", "",
                 (f"Made by {by}. " if by else "") + f"The file: [{path.name}]({path.name}).", "", *record_lines(record)]
        (stage / "records" / f"{path.stem}.md").write_text("\n".join(lines), encoding="utf8")
        shutil.copy(path, stage / "records" / path.name)
        rows.append([f"[{path.stem}]({path.stem}.md)", by])
        nav.append({path.stem: f"records/{path.stem}.md"})
    (stage / "records" / "index.md").write_text("\n".join(index + table(["record", "made by"], rows)), encoding="utf8")
    return ["records/index.md", *nav]


# -- the whole -----------------------------------------------------------------------------------------------------

CSS = """
.md-grid { max-width: 66rem; }
.md-typeset .md-typeset__scrollwrap, .md-typeset .md-typeset__table { margin: 0; padding: 0; }
.md-typeset__table { margin-bottom: .5em !important; }
math { font-size: 1.08em; }
.formula { overflow-x: auto; overflow-y: hidden; padding: .4rem 0; }
.md-typeset table code, .md-typeset td code { word-break: break-word; }
.md-typeset td, .md-typeset th { min-width: 0 !important; }
.md-typeset code, .md-typeset a { overflow-wrap: anywhere; }
.md-typeset h1, .md-typeset h2 { overflow-wrap: anywhere; }
.md-typeset .md-typeset__scrollwrap, .jp-RenderedHTMLCommon table, .jp-RenderedMarkdown table { overflow-x: auto; }
.jupyter-wrapper .jp-RenderedHTMLCommon table { display: block; max-width: 100%; width: fit-content; }
.jupyter-wrapper .jp-OutputArea-output { overflow-x: auto; }
.jupyter-wrapper .jp-OutputArea-output pre { overflow-x: auto; white-space: pre; }
.jupyter-wrapper img { max-width: 100%; height: auto; }
@media (max-width: 45em) {
  .jupyter-wrapper .zeroclipboard-container, .md-typeset .headerlink { display: none; }
  .md-typeset .md-content__inner > .highlight, .md-content__inner > .highlight { margin: 1em 0 !important; }
  .md-typeset h1 code, .md-typeset h2 code, .md-typeset h3 code, .md-typeset h4 code { word-break: break-all; padding: 0; font-size: .8em; }
}
.jupyter-wrapper .celltoolbar { background: none !important; border: 0 !important; height: auto !important; padding: 0 !important; }
.jupyter-wrapper .celltoolbar .cell-tag { font-size: .55rem; color: var(--md-default-fg-color--light); border: 0 !important; background: none !important; }
"""


def fill(stage=STAGE, wanted=lambda path: True):
    "Puts what mkdocs reads in the folder `stage`, notebooks only as far as they are wanted; the navigation"
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    names = api_names()
    notebooks = lambda paths: [notebook_page(p, names, stage) for p in paths if wanted(p)]
    nav = ["index.md"]
    for folder in wings():
        rooms = [folder / "index.ipynb", *reading_order(folder)]
        nav.append({promise(rooms[0])[0]: notebooks(rooms)})
    for folder, title in (("runs", "Runs"), ("doors", "Short names")):
        nav.append({title: notebooks(sorted((ROOT / "nbs" / folder).glob("*.ipynb")))})
    nav.append({"Records": record_pages(stage)})
    nav.append({"API": ["api/index.md", *({promise(ROOT / "nbs" / w / "index.ipynb")[0]: g} for w, g in api_pages(stage).items() if g)]})
    for source, page in PAGES.items():
        text = relinked((ROOT / source).read_text(encoding="utf8"), source, page)
        (stage / page).write_text(with_maths(named(text, names, page)), encoding="utf8")
    nav.append({"More": ["all.md", "contributing.md", "changelog.md"]})
    shutil.copytree(ROOT / "nbs" / "images", stage / "images")
    (stage / "site.css").write_text(CSS, encoding="utf8")
    return [n for n in nav if isinstance(n, str) or all(n.values())]


def config(nav, stage=STAGE, site=SITE):
    "mkdocs' configuration: material without fonts, trackers or anything from another host"
    return dict(
        site_name="pgolf", docs_dir=str(stage), site_dir=str(site), use_directory_urls=False, nav=nav,
        theme=dict(name="material", font=False, features=[
            "navigation.indexes", "navigation.prune", "navigation.tabs", "navigation.top", "navigation.footer", "content.code.copy",
            "search.highlight", "toc.follow"],
            palette=[dict(scheme="default", primary="indigo")]),
        plugins=["search", {"mkdocs-jupyter": dict(execute=False, ignore_h1_titles=False, toc_depth=3, cache=False, no_prompt=True)}],
        markdown_extensions=["tables", "attr_list", "pymdownx.superfences", "pymdownx.highlight", {"toc": dict(toc_depth=3)}],
        validation=dict(links=dict(not_found="ignore", unrecognized_links="ignore")),  # `check_docs.py` reads what was made
        extra_css=["site.css"], hooks=[str(Path(__file__).resolve())], extra=dict(generator=False))


def headings(content):
    "The table of contents, from the ids that the page really has"
    found = re.findall(r'<h([1-3])[^>]*\bid="([^"]+)"[^>]*>(.*?)</h\1>', content, re.S)
    top, path = [], []
    for level, anchor, inner in found:
        words = re.sub(r"<a class=\"anchor-link\".*?</a>|<[^>]+>", "", inner, flags=re.S).replace("¶", "").strip()
        item = dict(level=int(level), id=anchor, name=words, children=[])
        while path and path[-1]["level"] >= item["level"]: path.pop()
        (path[-1]["children"] if path else top).append(item)
        path.append(item)
    return top


def on_page_content(content, page, config, files):
    "mkdocs calls it: the same style sheet and script stand once on the site, not once in every page"
    from mkdocs.structure.toc import get_toc
    site = Path(config["site_dir"])

    def moved(m):
        kind = "css" if m[0].startswith("<style") else "js"
        body = re.sub(r"^<[^>]*>|</\w+>$", "", m[0])
        if not body.strip() or 'src="' in m[0][:m[0].index(">")]: return ""
        name = f"assets/page-{sha256(body.encode()).hexdigest()[:10]}.{kind}"
        target = site / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(body, encoding="utf8")
        to = relpath(name, Path(page.file.url).parent)
        return f'<link rel="stylesheet" href="{to}">' if kind == "css" else f'<script src="{to}"></script>'
    if not page.file.src_uri.endswith(".ipynb"): return content
    page.toc = get_toc(headings(content))
    head, wrapper, rest = content.partition('<div class="jupyter-wrapper">')
    body, end, tail = rest.rpartition("<!-- jupyter-wrapper -->")
    blocks = r"<style.*?</style>|<script.*?</script>"
    return re.sub(blocks, moved, head, flags=re.S) + wrapper + body + end + re.sub(blocks, moved, tail, flags=re.S)


def build(stage=STAGE, site=SITE, wanted=lambda path: True):
    "The site: every page in the folder `site`"
    import yaml
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    nav = fill(stage, wanted)
    file = stage.with_suffix(".yml")
    file.write_text(yaml.safe_dump(config(nav, stage, site), sort_keys=False), encoding="utf8")
    build(load_config(str(file)))


if __name__ == "__main__":
    build()
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.name}: open {SITE.name}/index.html, "
          f"or {SITE.name} through python -m http.server for the search")
