"""Kernels that fail to start, or wait for Slurm, as JupyterLab shows them in a browser, in each deployment."""

from __future__ import annotations

from contextlib import ExitStack

import nbformat
import pytest

from helpers.failing_starts import all_nodes_taken
from helpers.gateway_process import running_gateway, stop_all
from helpers.jupyterlab import LAB_OPTIONS, Page, write_notebook
from helpers.kernel_clients import install_kernelspec, jupyter_files_in
from helpers.notebook_server import running_server

MANAGER = "gateway_slurm.SlurmMappingKernelManager"
PLAIN, OWN, GATEWAY = "plain", "own", "gateway"
EXITS = ["sh", "-c", "sleep 2; echo no module >&2; exit 3"]
DIALOG = "Error Starting Kernel"
WAITS = "Interrupt the kernel to give it up."


@pytest.fixture(scope="module")
def pages(cluster, jupyter_base, tmp_path_factory):
    """A function that returns JupyterLab in a browser, for a deployment; each is started once."""
    with ExitStack() as stack:
        stack.enter_context(jupyter_files_in(jupyter_base))
        made = {}

        def page_of(deployment):
            if deployment not in made:
                options, environment = list(LAB_OPTIONS), {}
                if deployment == OWN:
                    options.append(f"--ServerApp.kernel_manager_class={MANAGER}")
                elif deployment == GATEWAY:
                    gateway = stack.enter_context(running_gateway(jupyter_base / "starts-of-gateway"))
                    options.append(f"--gateway-url={gateway.url}")
                    environment["JUPYTER_GATEWAY_AUTH_TOKEN"] = gateway.tokens["alice"]
                directory = jupyter_base / f"starts-{deployment}"
                directory.mkdir()
                server = stack.enter_context(running_server(directory, *options, environment=environment))
                made[deployment] = Page(server, tmp_path_factory.mktemp("browser"))
                stack.callback(made[deployment].close)
            return made[deployment]

        yield page_of


@pytest.fixture
def page_of(pages, kernelspecs, tmp_path):
    """The same, with kernelspecs; what the browsers showed last is kept in tmp_path."""
    used = []
    yield lambda deployment: used.append(pages(deployment)) or used[-1]
    for page in used:
        page.browser.save_screenshot(str(tmp_path / "last.png"))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("deployment", [PLAIN, OWN, GATEWAY])
async def test_a_start_that_fails_says_why_in_the_page(page_of, kernelspecs, deployment):
    """At once in a dialog; later in the cell that is run or in a dialog; and no cell waits without an end."""
    page = page_of(deployment)
    install_kernelspec(kernelspecs, "nowhere", config_overrides={"partition": "nowhere"})
    install_kernelspec(kernelspecs, "incomplete", config_overrides={"kernel_argv": None})
    install_kernelspec(kernelspecs, "long", config_overrides={"partition": "devel", "runtime": 31})
    install_kernelspec(kernelspecs, "exits", config_overrides={"kernel_argv": EXITS})
    for name, words in (("nowhere", "invalid partition specified: nowhere"), ("incomplete", "'kernel_argv'")):
        open_notebook(page, name)
        page.until(lambda words=words: DIALOG in page.text() and words in page.text(), f"no dialog for {name}")
        page.press(".jp-Dialog .jp-mod-accept")
    for name, words in (("long", "PartitionTimeLimit"), ("exits", "exit code 3")):
        open_notebook(page, name)
        if deployment == GATEWAY:
            page.until(lambda: page.state() == "starting", "the kernel does not start")
            page.run(0)
            page.until(lambda words=words: words in "".join(page.outputs()), f"no reason under the cell for {name}")
            assert DIALOG not in page.text()
            assert "[*]:" not in page.text()
        else:
            page.until(lambda words=words: DIALOG in page.text() and words in page.text(), f"no dialog for {name}")
            page.press(".jp-Dialog .jp-mod-accept")
    if deployment != PLAIN:
        # JupyterLab would run no cell with a dead kernel, and end none; one that is not listed it starts again.
        page.until(lambda: page.browser.execute_script(SESSION) is None, "the dead kernel is still there")
        install_kernelspec(kernelspecs, "exits")
        page.do("notebook:restart-kernel")
        page.until_idle()
        page.run(0)
        page.until(lambda: page.outputs() == ["1"], "the kernel that was started again does not run the cell")
    await stop_all(page.server)


def open_notebook(page, kernel, *cells):
    """Open a new notebook for this kernelspec; wait until its cells are there."""
    write_notebook(page.server, f"{kernel}.ipynb", kernel, *(cells or ("print(1)",)))
    page.open(f"{kernel}.ipynb")
    page.until(lambda: page.browser.execute_script(CELLS) == len(cells or "1"), "the notebook is not open")


SESSION = "return window.jupyterapp.shell.currentWidget.sessionContext.session && 'a session'"
CELLS = "return window.jupyterapp.shell.currentWidget.content.widgets.length"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("deployment", [OWN, GATEWAY])
async def test_a_kernel_that_waits_shows_it_under_the_cell(page_of, cluster, deployment):
    """Restart goes on waiting; the text leaves the notebook before the cell runs; an interrupt gives up the start."""
    page = page_of(deployment)
    with all_nodes_taken(cluster):
        open_notebook(page, "slurm", "print('ran')", "silent = 1")
        page.until(lambda: page.state() == "starting", "the kernel does not start")
        page.run(0)
        page.until(lambda: WAITS in page.outputs()[0], "the wait is not shown")
        assert page.outputs()[0].startswith("Waiting for job ")
        page.do("notebook:restart-kernel")
        page.press(".jp-Dialog .jp-mod-accept")
        page.until(lambda: "[*]:" not in page.text(), "the restart has not begun")  # JupyterLab forgets the cells
        page.until(lambda: page.state() == "starting", "the page hangs in the restart")
        for cell in (1, 0):
            page.run(cell)
        page.until(lambda: page.outputs() == [page.outputs()[0]] and WAITS in page.outputs()[0], "the wait has gone")
    page.until(lambda: page.outputs() == ["ran"], "the cells did not run, or the text is still there")
    page.until_idle()
    page.do("docmanager:save")
    saved = page.server.log.parent / "slurm.ipynb"
    page.until(lambda: "output_type" in saved.read_text(), "the notebook is not saved")
    outputs = [cell.outputs for cell in nbformat.read(saved, 4).cells]
    assert [[output.text for output in cell] for cell in outputs] == [["ran\n"], []]
    page.do("kernelmenu:shutdown")
    page.until(lambda: "No Kernel" in page.text(), "the kernel was not shut down")

    with all_nodes_taken(cluster):
        open_notebook(page, "slurm", "print('ran')", "print('too')")
        page.until(lambda: page.state() == "starting", "the kernel does not start")
        page.run(0)
        page.run(1)
        page.until(lambda: page.outputs() and WAITS in page.outputs()[0], "the wait is not shown")
        page.do("notebook:interrupt-kernel")
        given_up = "given up by an interrupt while it waited for job"
        page.until(lambda: [given_up in text for text in page.outputs()] == [True, True], "the cells do not say so")
        assert "[*]:" not in page.text()
    await stop_all(page.server)
