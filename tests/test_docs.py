"The site: what mkdocs is given, what a browser sees of it, and that the checker sees what is wrong"
import importlib.util
import re
import shutil
import sys

import pytest


@pytest.fixture(scope="session")
def tools(root):
    "A module of tools/ by name"
    def load(name):
        sys.path.insert(0, str(root / "tools"))
        try: return importlib.import_module(name)
        finally: sys.path.remove(str(root / "tools"))
    return load


@pytest.fixture(scope="session")
def docs(tools): return tools("docs")


def need(*names):
    for name in names:
        if importlib.util.find_spec(name) is None: pytest.skip(f"{name} is not installed (make docs installs it)")


def test_links_of_notebooks_become_links_of_pages(docs):
    text = "[a](xsa.ipynb) [b](../7_lab/heat.ipynb#x) [c](../../README.md) [d](https://a.b/c.ipynb) [e](#f)"
    said = docs.relinked(text, "nbs/2_model/gpt.ipynb", "2_model/gpt.html")
    assert said == "[a](xsa.html) [b](../7_lab/heat.html#x) [c](../index.html) [d](https://a.b/c.ipynb) [e](#f)"
    with pytest.raises(ValueError, match="no page of the site"):
        docs.relinked("[a](nothing.ipynb)", "nbs/2_model/gpt.ipynb", "2_model/gpt.html")


def test_a_public_name_in_backticks_leads_to_its_api_page(docs):
    names = {"GPT": "api/model.gpt.html#GPT"}
    said = docs.named("`GPT` and `GPT()`, not [`GPT`](x) nor `GPTX`", names, "2_model/gpt.html")
    assert said == ("[`GPT`](../api/model.gpt.html#GPT) and [`GPT()`](../api/model.gpt.html#GPT), not [`GPT`](x) nor `GPTX`")


def test_formulas_become_mathml_and_code_stays(docs):
    need("latex2mathml")
    said = docs.with_maths("a $x_i$ b\n\n$$\\frac{a|b}{2}$$\n\n`$OUT` costs $5\n\n    $HOME = $x$\n")
    assert said.count("<math") == 2 and "<mfrac>" in said and 'class="formula"' in said
    assert "`$OUT` costs $5" in said and "    $HOME = $x$" in said
    assert not re.search(r"<m[ion][^>]*>[^<]*[|_*][^<]*<", said), "nothing in a formula that markdown would read"


def test_the_api_page_has_docments_fields_and_sources(docs):
    from pgolf.model import xsa
    page = docs.api_page(xsa, docs.ROOT / "nbs" / "2_model" / "xsa.ipynb")
    assert "## `exclude_self` { #exclude_self }" in page
    assert "the values attended to, G divides H" in page and "| **returns** | <code>Tensor</code> |" in page
    assert "in the last so many layers only; 0 = all" in page and "[PR 1232](" in page


def test_the_checker_sees_a_broken_link(tools, tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here"></a><a href="b.html#gone"></a><a href="c.html"></a>')
    (tmp_path / "b.html").write_text('<p id="here"></p>')
    said = list(tools("check_docs").broken_links(tmp_path))
    assert said == ["a.html: b.html#gone names no place on b.html", "a.html: c.html leads nowhere"]


@pytest.mark.slow
def test_every_notebook_and_record_finds_its_place(docs, root, tmp_path):
    need("latex2mathml")
    docs.fill(tmp_path / "stage")
    made = {p.relative_to(tmp_path / "stage").as_posix() for p in (tmp_path / "stage").rglob("*.*")}
    for path in (root / "nbs").glob("*/*.ipynb"):
        assert path.relative_to(root / "nbs").as_posix() in made
    assert {f"records/{p.stem}.md" for p in (root / "records").glob("*.json")} <= made


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")
def test_pages_in_a_browser_and_what_the_checker_says_of_a_bad_one(docs, tools, tmp_path):
    "A few pages; `make check-docs` looks at all of them"
    need("mkdocs", "material", "mkdocs_jupyter", "latex2mathml", "playwright")
    wanted = {"2_model/xsa", "3_train/schedule", "runs/record"}
    docs.build(tmp_path / "stage", tmp_path / "site", lambda p: f"{p.parent.name}/{p.stem}" in wanted)
    site, look = tmp_path / "site", tools("check_docs").looked_at
    (site / "bad.html").write_text("""<body><div class="md-content"><p style="width:9em;white-space:nowrap">A line that is much wider than its
        paragraph</p></div><img src="http://192.0.2.1/x.png"><script>nothing()</script></body>""")
    pages = [f"{name}.html" for name in (*wanted, "index", "api/model.xsa", "records/referee", "contributing")]
    assert look(site, pages) == []
    said = look(site, ["bad.html"], {"desk": (900, 600)})
    for word in ("clipped: p.", "asks http://192.0.2.1", "nothing is not defined"):
        assert any(word in line for line in said), (word, said)
