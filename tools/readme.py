"""README.md from nbs/index.ipynb, its pictures of records, and nbs/README.md, the list of all notebooks: `python tools/readme.py`
writes them, `--check` says whether they are up to date.

Cells that start with `#| hide` stay out, the others go through nbconvert; links are turned to start from the root of the
repository. `<!-- wings -->`, `<!-- techniques -->`, `<!-- compared -->` and others become tables and sentences made from the notebooks, the package
and the records."""
import importlib
import json
import re
import sys
from os.path import normpath
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]
INDEX, README = ROOT / "nbs" / "index.ipynb", ROOT / "README.md"


def hidden(cell):
    "Is the cell for checks only?"
    return cell.cell_type == "code" and re.match(r"\s*#\|\s*hide\b", cell.source)


def promise(path):
    "Title and promise of a notebook: its first heading and the quoted line under it"
    if not path.exists():
        return path.parent.name[2:], ""
    first = nbformat.read(path, as_version=4).cells[0].source
    title, story = [line for line in first.splitlines() if line.strip()][:2]
    return title.lstrip("# "), story.lstrip("> ")


def reading_order(folder):
    "Rooms of a wing as its index page lists them, then those that it does not list"
    rooms = sorted(p.name for p in folder.glob("*.ipynb") if p.name != "index.ipynb")
    index = folder / "index.ipynb"
    listed = re.findall(r"\]\((\w+\.ipynb)\)", index.read_text(encoding="utf8")) if index.exists() else []
    return [folder / name for name in dict.fromkeys([n for n in listed if n in rooms] + rooms)]


def wings():
    "Folders of the wings, in order"
    return sorted(ROOT.glob("nbs/[0-9]_*"))


def wings_table():
    "Every wing with a link to the page that tells its story"
    lines = ["| wing | what goes in, what comes out | notebooks |", "|---|---|---|"]
    for folder in wings():
        title, story = promise(folder / "index.ipynb")
        lines.append(f"| [{title}]({folder.relative_to(ROOT)}/index.ipynb) | {story} | {len(reading_order(folder))} |")
    return "\n".join(lines)


def all_rooms():
    "nbs/README.md: every notebook with a link and what it promises, wing by wing, in reading order"
    lines = ["# All notebooks", "", "| notebook | what goes in, what comes out |", "|---|---|"]
    for folder in wings():
        lines.append(f"| **[{promise(folder / 'index.ipynb')[0]}]({folder.name}/index.ipynb)** | |")
        for path in reading_order(folder):
            title, story = promise(path)
            lines.append(f"| [{title}]({path.relative_to(ROOT / 'nbs')}) | {story} |")
    return "\n".join(lines) + "\n\n<!-- made from the notebooks by `make readme` -->\n"


PULLS = "https://github.com/openai/parameter-golf/pull"
BASES = "model.part.Part", "pack.repairs.Repair", "score.wrap.Predictor"


def technique_classes():
    "(class, notebook) of every technique that is a value with a name for tables"
    from pgolf.ground.settings import every
    for base in BASES:
        room, _, name = base.rpartition(".")
        for cls in every(getattr(importlib.import_module(f"pgolf.{room}"), name)).values():
            if cls.title:
                _, wing, room = cls.__module__.split(".")
                yield cls, next(ROOT.glob(f"nbs/[0-9]_{wing}/{room}.ipynb"))


OF_FIELDS = {  # technique that is a field of settings -> notebook, what it does, where it comes from
    "LN scale": ("2_model/config", "Deeper layers read a smaller stream: layer i times 1/sqrt(i + 1)", ""),
    "weight averaging": ("3_train/averaging", "What is packed is a mean over the last steps", ""),
    "row-normalised Muon": ("3_train/muon", "Rows of a gradient have one length before it is made orthogonal", f"{PULLS}/1536"),
    "Polar Express": ("3_train/newton_schulz", "Another polynomial in each Newton-Schulz step", "https://arxiv.org/abs/2505.16932"),
    "quantisation-aware training": ("3_train/qat", "Weights are rounded in the forward pass, late in training", ""),
    "GPTQ": ("4_pack/gptq", "A column's rounding error is taken back by the columns after it", "https://arxiv.org/abs/2210.17323"),
    "sliding windows": ("5_score/windows", "Every target is scored with much context", "")}


def technique_fields():
    "(technique, word that overrides use) of every technique that is a field of some recipe's settings"
    import dataclasses

    from pgolf import recipes
    from pgolf.ground.settings import walk_settings
    found = {}
    for name in recipes.names():
        for path, value in walk_settings(recipes.get(name)):
            for f in dataclasses.fields(value):
                if technique := f.metadata.get("technique"):
                    found[technique] = f"{value.kind or path[-1]}__{f.name}"
    return found


def source_link(url):
    "A pull request or a paper as a short link"
    number = re.search(r"/pull/(\d+)$", url)
    return f"[PR {number[1]}]({url})" if number else f"[paper]({url})" if url else ""


def users(cls):
    "Names of the recipes that use a technique"
    from pgolf import recipes
    from pgolf.ground.settings import walk_settings

    def inside(recipe):
        sections = vars(recipe).values()
        return (value for section in sections for _, value in walk_settings(section))

    return [f"`{name}`" for name in recipes.names() if any(type(v) is cls for v in inside(recipes.get(name)))]


def weights_of(cls):
    "Weights a technique adds to the largest full-size model of a recipe that has it; '' where no recipe has it"
    import torch

    from pgolf import recipes
    from pgolf.model.part import Part
    from pgolf.score.wrap import Predictor
    if issubclass(cls, Predictor): return "0"  # it acts when a text is scored, and brings nothing along in the file
    if not issubclass(cls, Part): return ""
    found = []
    for name in recipes.names():
        config = recipes.get(name).model
        for part in (p for p in config.parts if type(p) is cls):
            with torch.device("meta"): made = part.weights(config, None)
            found.append(sum(w.value.numel() for w in made.values()))
    return f"{max(found):,}" if found else ""


ABLATED = {"best": ["ablation"], "pr2135": ["ablation_pr2135", "ablation_softcap"], "pr2014": ["ablation_pr2014"]}  # records


def cost(recipe, found):
    "What it costs a recipe in bits per byte, with the error of the difference and how often chance makes as much"
    mean, error, p = found
    return f"`{recipe}` {mean:+.3f} ± {error:.3f}, p {p:.2g}"


def costs_of(title, used):
    "What taking a technique away costs the recipes from which it was taken"
    from pgolf.lab.found import worths
    if title == "tilt in stream order": return cost_of_order()
    found = [(name, worths(facts(record)).get(f"no {title}")) for name in ABLATED if f"`{name}`" in used for record in ABLATED[name]]
    return "<br>".join(cost(name, f) for name, f in found if f)


def cost_of_order():
    "What hints in the order of scoring cost against the record's, which no decoder has"
    from pgolf.lab.statistics import paired_difference
    record = facts("hint_orders")
    ours, theirs = (record["scores"][variant] for variant in ("all on", "hints in stream order"))
    return cost(record["parameters"]["recipe"], paired_difference(ours, theirs))


def entry_step(url):
    "What the entry that brought a technique gained, as reported; '' where the line of records does not say"
    from pgolf.recipes.frontier import entry_gain
    number = re.search(r"/pull/(\d+)$", url)
    gain = number and entry_gain(int(number[1]))
    return f"{gain:+.4f}" if gain else ""


def step_cost(kind, costs):
    "Milliseconds that a technique adds to a step, by forecast, and of what; '' where no step has it"
    found = costs.get(kind)
    if not found or not found["ms"] or not found["without"]: return ""
    return f"{found['ms'] - found['without']:+.1f} of {found['ms']:.0f}"


def facts(name):
    "A record of ours"
    return json.loads((ROOT / "records" / f"{name}.json").read_text(encoding="utf8"))


def switched_in(technique):
    "Names of the recipes that have a technique which is a field"
    from pgolf import recipes
    from pgolf.recipes.overrides import switches
    return [f"`{name}`" for name in recipes.names() if technique in switches(recipes.get(name))]


def technique_rows():
    "Cells of every technique: notebook, what it does, source, gain of its entry, recipes, weights, milliseconds, gains here"
    costs = facts("step_costs")["costs"]
    for cls, path in technique_classes():
        does = (cls.__doc__ or "").strip().splitlines()[0]
        used = users(cls)
        yield [f"[{promise(path)[0]}]({path.relative_to(ROOT)})", does, source_link(cls.source), entry_step(cls.source),
               ", ".join(used), weights_of(cls), step_cost(cls.kind, costs), costs_of(cls.title, used)]
    for technique, word in technique_fields().items():
        page, does, source = OF_FIELDS[technique]
        used = switched_in(technique)
        yield [f"[{technique[0].upper()}{technique[1:]}](nbs/{page}.ipynb)", does, source_link(source), entry_step(source),
               ", ".join(used), "0", step_cost(word, costs), costs_of(technique, used)]
    yield from numbers_rows()
    yield from text_rows()
    yield order_row()


NUMBERS = {  # technique that is a number, as its ablation calls it -> notebook, what it does, source, is it in these settings?
    "growth of context": ("3_train/growth", "A run begins on short sequences, and on many of them", f"{PULLS}/2014",
                          lambda train: bool(train.context)),
    "floor of the learning rate": ("3_train/schedule", "The learning rate ends at a tenth, not at zero", "",
                                   lambda train: train.min_lr > 0)}


def numbers_rows():
    "Cells of the techniques that are numbers of a recipe's training"
    from pgolf import recipes
    for technique, (page, does, source, inside) in NUMBERS.items():
        used = [f"`{name}`" for name in recipes.names() if inside(recipes.get(name).train)]
        yield [f"[{technique[0].upper()}{technique[1:]}](nbs/{page}.ipynb)", does, source_link(source), entry_step(source),
               ", ".join(used), "0", "", costs_of(technique, used)]


def text_rows():
    "Cells of the two transforms of a text, each against the form before it"
    from pgolf.lab.found import forms_worth
    from pgolf.recipes.frontier import FRONTIER
    record, page, pull = facts("forms"), "nbs/1_text/caseops.ipynb", f"{PULLS}/1729"
    first, fused = (cost(record["parameters"]["recipe"], found) for found in forms_worth(record).values())
    used = ", ".join(f"`{name}`" for name in FRONTIER)
    yield [f"[CaseOps]({page})", "Capitals are marks in the text, written before the tokenizer is trained", source_link(pull),
           entry_step(pull), used, "0", "0", first]
    yield [f"[CaseOps with fused marks]({page})", "A mark and the space before it are one symbol", source_link(f"{PULLS}/2109"),
           "-0.0025, as it says itself", "", "0", "0", fused]


def order_row():
    "Cells of the order of rows, which changes bytes and no score"
    record = json.loads((ROOT / "benchmarks" / "results" / "row_order.json").read_text(encoding="utf8"))
    q = record["matrices"]["banks.up"]
    brotli, ours = (f"{before - after:,} of {before:,} bytes less under {coder}"
                    for coder, (before, after) in (("brotli", q["brotli"]), ("our coder", q["ours"])))
    return ["[Rows in another order](nbs/4_pack/row_order.ipynb)", "Similar rows side by side, for a coder with a memory",
            source_link(f"{PULLS}/1855"), entry_step(f"{PULLS}/1855"), "", "0", "",
            f"`{record['recipe']}`, hidden units: {brotli}, {ours}"]


def techniques_table():
    "Every technique with its notebook, its source, who uses it, what it costs and what it was worth here"
    head = ["technique", "what it does", "from", "its entry gained", "in recipes", "weights", "step, ms",
            "taken away here, bpb"]
    lines = [head, ["---"] * len(head), *technique_rows()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


COMPARED = "compare_web", "compare"  # records, in the order of the table's columns


def compared_rows():
    "Recipes with mean and spread on each text, the lowest on the first text first"
    from pgolf.lab.found import standings
    on = [{n: f"{mean:.4f} | {sd:.4f}" for n, mean, sd, _ in standings(facts(record))} for record in COMPARED]
    return "\n".join(f"| `{n}` | {' | '.join(text[n] for text in on)} |" for n in on[0])


def shown_sentence():
    "Which techniques the ablation of `best` shows to help, and which not"
    from pgolf.lab.found import shown, worths
    record = facts("ablation")
    helps = [v.removeprefix("no ") for v in shown(record)]
    return f"Shown to help (p < 0.05): {', '.join(helps)}. Of the other {len(worths(record)) - len(helps)} nothing good is shown in so short a run:"


def result_block():
    "What `make run` prints near its end, from the record of that run"
    record = facts("tiny")
    name, run = next(iter(record["runs"].items()))
    best = min(map(min, record["compressors"].values()))
    lines = ["bits per byte   alone  after the training text", "-------------  ------  -----------------------"]
    lines += [f"{tool:13}  {alone:.4f}  {after:23.4f}" for tool, (alone, after) in record["compressors"].items()]
    lines += [f"{'result':40}  {name:>12}", f"{'-' * 40}  {'-' * 12}"]
    rows = {"val_bpb": f"{run['val_bpb']:.4f}", "best compressor, after the training text": f"{best:.4f}",
            "tokens": f"{record['tokens']:,}", "bytes": f"{record['bytes']:,}", "artifact bytes": f"{run['artifact_bytes']:,}",
            "artifact hash": run["artifact_sha256"][:12]}
    return "\n".join(["```", *lines, *(f"{key:40}  {value:>12}" for key, value in rows.items()), "```"])


def old_pictures():
    "Names of the README's pictures that do not draw what recipes and records say"
    from PIL import Image
    sys.path.insert(0, str(ROOT / "tools"))
    import pictures
    for name, (find, _) in pictures.DRAWN.items():
        drawn = json.loads(Image.open(pictures.IMAGES / f"{name}.png").text.get(pictures.FACTS, "[]"))
        if drawn != find(): yield name


def draw_again(names):
    "The pictures, from what recipes and records say now"
    import pictures
    for name in names: pictures.write_drawn(name)


def readme(index):
    "The text of README.md for this notebook"
    nb = nbformat.read(index, as_version=4)
    nb.cells = [c for c in nb.cells if not hidden(c)]
    nb.metadata["language_info"] = {"name": "python"}
    text, _ = MarkdownExporter().from_notebook_node(nb)
    text = re.sub(r"\]\((?![a-z]+:|#)([^)]+)\)", lambda m: f"]({normpath('nbs/' + m[1])})", text)
    text = text.replace("<!-- wings -->", wings_table()).replace("<!-- techniques -->", techniques_table())
    text = text.replace("<!-- result -->", result_block()).replace("<!-- compared -->", compared_rows())
    text = text.replace("<!-- shown -->", shown_sentence())
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    return text + "\n<!-- made from nbs/index.ipynb by `make readme`: edit there -->\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    pages = {README: readme(INDEX), ROOT / "nbs" / "README.md": all_rooms()}
    for page, text in pages.items():
        if "--check" not in sys.argv[1:]:
            page.write_text(text, encoding="utf8")
        elif not page.exists() or page.read_text(encoding="utf8") != text:
            sys.exit(f"{page.relative_to(ROOT)} is not what the notebooks say: run make readme")
    old = list(old_pictures())
    if "--check" not in sys.argv[1:]: draw_again(old)
    elif old: sys.exit(f"nbs/images: {', '.join(old)} draw other facts than recipes and records: run make readme")
    print("README.md is up to date")
