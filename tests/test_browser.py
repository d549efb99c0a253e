"The record notebook in a real JupyterLab, in a real browser, one cell after another as a person would"
import json
import shutil
import socket
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from pgolf.lab.launch import start_command

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
pytestmark = [pytest.mark.slow, pytest.mark.browser,
              pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (Debian: apt install chromium)")]
NOTEBOOK = "nbs/runs/record.ipynb"
WIDGET = "window.jupyterapp.shell.currentWidget"
# all cells have run (Shift+Enter on the last one adds an empty cell), or one has failed
OVER = """() => {
  const widget = window.jupyterapp.shell.currentWidget;
  const cells = widget.content.widgets.map(c => c.model).filter(m => m.type === "code" && m.sharedModel.source);
  const failed = cells.some(m => m.outputs.toJSON().some(o => o.output_type === "error"));
  const idle = widget.sessionContext.session.kernel.status === "idle";
  return failed || (idle && cells.every(m => m.executionCount));
}"""
KERNEL = f"{WIDGET}?.sessionContext?.session?.kernel?.status"


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def by_module(folder, options):
    "JupyterLab as the tests of a run notebook start it"
    return [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", *options]


def typed_at_the_root(folder, options):
    "`jupyter lab`, as a person types it in a clone"
    return [Path(sys.executable).with_name("jupyter"), "lab", *options]


def typed_in_nbs(folder, options):
    return ["env", "-C", folder / "nbs", *typed_at_the_root(folder, options)]


def made(folder, options):
    "`make lab`, where .venv is there already; as root it allows root by itself"
    own = [o for o in options if o != "--allow-root"]
    return ["make", "-s", "-o", ".venv/.installed", f"BIN={Path(sys.executable).parent}", "lab", f"ARGS={' '.join(own)}"]


@contextmanager
def jupyterlab(folder, home, start=by_module):
    "A JupyterLab of our own: nobody's settings, no token, no news pop-up; its address"
    settings = home / "overrides"
    settings.mkdir(parents=True)
    (settings / "overrides.json").write_text(json.dumps(
        {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}))
    port = free_port()
    env = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env |= {"IPYTHONDIR": str(home / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    log = open(home / "server.log", "wb")
    options = ["--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", "--IdentityProvider.token=",
               "--ServerApp.password=", f"--LabApp.app_settings_dir={settings}", "--expose-app-in-browser"]
    server = start_command(["sh", "-c", 'exec "$0" "$@" > ' + f"'{log.name}' 2>&1", *map(str, start(folder, options))],
                           cwd=folder, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(address + "/api/status", timeout=5).read()
                break
            except OSError:
                assert server.poll() is None, (home / "server.log").read_text()
                time.sleep(0.3)
        yield address
    finally:
        server.stdin.close()
        server.wait()
        log.close()


def type_parameters(path, parameters):
    "Sets parameters as a person would: at the end of the cell that holds them"
    nb = nbformat.read(path, as_version=4)
    cell = next(c for c in nb.cells if "parameters" in c.metadata.get("tags", []))
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(nb, path)
    return nb


def test_record_runs_cell_by_cell_in_jupyterlab(bench, tmp_path, small_run):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = tmp_path / "repo"
    shutil.copytree(bench, folder, ignore=shutil.ignore_patterns("out", "data"))
    nb = type_parameters(folder / NOTEBOOK, small_run)
    with jupyterlab(folder, tmp_path / "home") as address, sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        try:
            page.goto(f"{address}/lab/tree/{NOTEBOOK}", timeout=90_000)
            page.wait_for_function(f"window.jupyterapp && {KERNEL} === 'idle'", timeout=90_000)
            page.locator(".jp-Notebook .jp-Cell").first.click()
            page.keyboard.press("Escape")
            for _ in nb.cells:
                page.keyboard.press("Shift+Enter")
            page.wait_for_function(OVER, timeout=240_000)
            assert page.locator(".jp-RenderedImage img").count() > 0
            page.evaluate("() => { window.jupyterapp.commands.execute('docmanager:save') }")
            page.wait_for_function(f"!{WIDGET}.context.model.dirty", timeout=30_000)
        except Exception:
            page.screenshot(path=str(tmp_path / "failed.png"))
            raise
        finally:
            browser.close()
    saved = nbformat.read(folder / NOTEBOOK, as_version=4)
    code = [c for c in saved.cells if c.cell_type == "code" and c.source]
    outputs = [o for c in code for o in c.outputs]
    assert [o for o in outputs if o.output_type == "error"] == []
    assert all(c.execution_count for c in code)
    printed = [o.text for o in outputs if o.output_type == "stream"]
    assert any("val_bpb" in text for text in printed)
    assert "no rule is broken" in printed[-1], "the notebook ends with the referee's verdict"
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 3
    assert len(list((folder / "out").glob("*/model.pgolf"))) == 1, "the run folder lies under the repository's root"


COMPONENT = "nbs/0_ground/bits.ipynb"


@pytest.mark.parametrize("start", [typed_at_the_root, typed_in_nbs, made])
def test_a_component_notebook_is_edited_run_and_saved(root, tmp_path, start):
    "From whatever folder JupyterLab is started: what it serves, and the repository's own jupytext.toml"
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    folder = tmp_path / "repo"
    (folder / "nbs").mkdir(parents=True)
    shutil.copytree(root / "nbs" / "0_ground", folder / "nbs" / "0_ground")
    for file in ("jupytext.toml", "settings.ini", "Makefile", "setup.py", "constraints.txt"):
        shutil.copy(root / file, folder)
    shown = COMPONENT if start is typed_at_the_root else COMPONENT.removeprefix("nbs/")
    before = nbformat.read(folder / COMPONENT, as_version=4)
    with jupyterlab(folder, tmp_path / "home", start) as address, sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        try:
            page.goto(f"{address}/lab/tree/{shown}", timeout=90_000)
            page.wait_for_function(f"window.jupyterapp && {KERNEL} === 'idle'", timeout=90_000)
            page.locator(".jp-Notebook .jp-Cell").first.click()
            page.keyboard.press("Escape")
            page.keyboard.press("b")
            page.keyboard.press("Enter")
            page.keyboard.type("print(6*7)")
            page.keyboard.press("Shift+Enter")
            page.locator(".jp-OutputArea-output", has_text="42").first.wait_for(timeout=60_000)
            page.keyboard.press("Control+s")
            page.wait_for_function(f"!{WIDGET}.context.model.dirty", timeout=30_000)
            assert page.locator(".jp-Dialog").count() == 0, page.locator(".jp-Dialog").inner_text()
        except Exception:
            page.screenshot(path=str(tmp_path / "failed.png"))
            raise
        finally:
            browser.close()
    saved = nbformat.read(folder / COMPONENT, as_version=4)
    added = [c for c in saved.cells if c.source == "print(6*7)"]
    assert len(added) == 1 and added[0].outputs[0].text == "42\n"
    assert {c.id for c in before.cells} <= {c.id for c in saved.cells}
