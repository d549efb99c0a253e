"""A mirror: how dense, how large and how well explained the house is. Prints a table; nothing fails.

`python tools/measure.py [ROOT]` measures the repository at ROOT (default: this one). Tests hold the rules;
these figures are only to look at, beside those of repositories that read well."""
import ast
import json
import re
import sys
from functools import cached_property
from pathlib import Path
from statistics import median

LONG_LINE = 110
LONG_CELL = 30
DEFINITION = (ast.FunctionDef, ast.ClassDef)


class Module:
    "One file of the package"
    def __init__(self, path, package):
        self.path = path
        self.name = ".".join(path.relative_to(package).with_suffix("").parts)
        self.text = path.read_text(encoding="utf8")
        self.tree = ast.parse(self.text)

    @cached_property
    def lines(self):
        "Number of lines"
        return len(self.text.splitlines())

    @cached_property
    def code(self):
        "Lines that are neither blank nor only a comment"
        stripped = (line.strip() for line in self.text.splitlines())
        return [line for line in stripped if line and not line.startswith("#")]

    @cached_property
    def functions(self):
        "Every function and method"
        return [n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef)]

    @cached_property
    def imported(self):
        "Names that the import statements bind"
        statements = [n for n in ast.walk(self.tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        return [a.asname or a.name for n in statements for a in n.names]

    @cached_property
    def public(self):
        "Names of functions and classes without an underscore, as far as nbdev exports them"
        listed = re.search(r"^__all__ = (\[.*?\])", self.text, re.MULTILINE | re.DOTALL)
        exported = set(ast.literal_eval(listed[1])) if listed else set()
        return {n.name for n in self.tree.body if isinstance(n, DEFINITION)} & exported


def is_docstring(node):
    "Is a statement only text?"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def density(function, text_lines):
    "AST nodes per line of a function's body, its docstring left out; None without a body"
    body = [n for n in function.body if not is_docstring(n)]
    if not body:
        return None
    nodes = sum(1 for statement in body for _ in ast.walk(statement))
    covered = text_lines[body[0].lineno - 1:body[-1].end_lineno]
    return nodes / sum(1 for line in covered if line.strip() and not line.strip().startswith("#"))


def notebook_cells(path):
    "(kind, source) of every cell"
    return [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text(encoding="utf8"))["cells"]]


def is_export(source):
    return re.search(r"^#\|\s*exporti?\b", source, re.MULTILINE) is not None


def definitions(source):
    "Top-level functions and classes of a cell; none where it is not plain Python"
    try:
        return [n for n in ast.parse(source).body if isinstance(n, DEFINITION)]
    except SyntaxError:
        return []


def is_test(source):
    "Does a cell that is not exported check anything?"
    return not is_export(source) and re.search(r"\bassert\b|\btest_\w+\(|\bcheck\w*\(", source) is not None


def code_lines(source):
    stripped = (line.strip() for line in source.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def used_outside(modules):
    "Share of public functions and classes that another module imports"
    public = [(m.name, name) for m in modules for name in m.public]
    users = [(m.name, set(m.imported)) for m in modules]
    used = [name for home, name in public if any(name in names for user, names in users if user != home)]
    return len(used) / max(1, len(public))


def measure(root):
    "Measure -> text"
    package = root / "pgolf"
    modules = [Module(p, package) for p in sorted(package.rglob("*.py")) if not p.name.startswith("_")]
    rooms = [m for m in modules if m.functions or m.public]
    densities = [density(f, m.text.splitlines()) for m in rooms for f in m.functions]
    notebooks = [p for p in sorted((root / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]
    components = [p for p in notebooks if "runs" not in p.parts and "doors" not in p.parts and p.stem != "index"]
    cells = [cell for p in components for cell in notebook_cells(p)]
    exports = [s for kind, s in cells if kind == "code" and is_export(s) and definitions(s)]
    exported = [d for s in exports for d in definitions(s) if not d.name.startswith("_")]
    tests = [s for kind, s in cells if kind == "code" and is_test(s)]
    prose = " ".join(s for kind, s in cells if kind == "markdown")
    written = sum(len(code_lines(s)) for kind, s in cells if kind == "code")
    words = len(re.findall(r"[^\W_]\S*", prose))
    all_code = [line for m in rooms for line in m.text.splitlines() if line.strip()]
    raises = sum(isinstance(n, ast.Raise) for m in rooms for n in ast.walk(m.tree))
    links = prose.count("](")
    lengths = [f.end_lineno - f.lineno + 1 for m in rooms for f in m.functions]
    sizes, imported = [m.lines for m in rooms], [len(m.imported) for m in rooms]
    share = lambda part, whole: f"{100 * part / max(1, whole):.1f} %"
    return {
        "modules; lines in all": f"{len(rooms)}; {sum(sizes):,}",
        "module lines, median / max": f"{median(sizes):.0f} / {max(sizes):,}",
        "function lines, median / max": f"{median(lengths):.0f} / {max(lengths)}",
        "AST nodes per body line, median": f"{median(d for d in densities if d):.1f}",
        f"code lines over {LONG_LINE} characters": share(sum(len(x) > LONG_LINE for x in all_code), len(all_code)),
        "names a module imports, median / max": f"{median(imported):.0f} / {max(imported)}",
        f"export cells over {LONG_CELL} lines": share(sum(len(s.splitlines()) > LONG_CELL + 1 for s in exports), len(exports)),
        "export cells over one definition": share(sum(len(definitions(s)) > 1 for s in exports), len(exports)),
        "test cells per exported definition": f"{len(tests) / max(1, len(exported)):.2f}",
        "public names used outside their module": f"{100 * used_outside(rooms):.0f} %",
        "`raise` per 100 lines of code": f"{100 * raises / sum(len(m.code) for m in rooms):.2f}",
        "words of prose per line of code": f"{words / max(1, written):.2f}",
        "links per 1,000 words": f"{1000 * links / max(1, words):.2f}",
    }


def by_module(root):
    "The largest modules and longest functions, to see what to split next"
    package = root / "pgolf"
    modules = [Module(p, package) for p in sorted(package.rglob("*.py")) if not p.name.startswith("_")]
    longest = lambda m: max(((f.end_lineno - f.lineno + 1, f.name) for f in m.functions), default=(0, "-"))
    rows = sorted(((m.lines, m.name, *longest(m)) for m in modules if m.functions), reverse=True)
    return [f"  {lines:5}  {name:32} longest: {name_of} ({n})" for lines, name, n, name_of in rows]


if __name__ == "__main__":
    arguments = [a for a in sys.argv[1:] if not a.startswith("-")]
    where = Path(arguments[0]).resolve() if arguments else Path(__file__).resolve().parents[1]
    for what, value in measure(where).items():
        print(f"{what:42} {value}")
    if "--modules" in sys.argv[1:]:
        print("\nlines  module\n" + "\n".join(by_module(where)))
