"""JupyterLab in a browser, on a Jupyter server whose kernels are the gateway's."""

from __future__ import annotations

import shutil
from pathlib import Path

import nbformat
import nbformat.v4 as nbf
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from helpers.gateway_process import running_gateway
from helpers.kernel_clients import READY, jupyter_files_in
from helpers.notebook_server import running_server

WHERE = "import os; print('on', os.environ['SLURMD_NODENAME'], 'in', os.environ['SLURM_JOB_ID'])"
PLOT = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);"
LOOP = "import time\nprint('loops', flush=True)\nwhile True:\n    time.sleep(0.1)"
BROWSER = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--no-proxy-server",
    "--window-size=1200,1000",
]


@pytest.fixture(scope="module")
def module_lab(cluster, jupyter_base):
    """A Jupyter server with JupyterLab, and its gateway."""
    with jupyter_files_in(jupyter_base):
        directory = jupyter_base / "lab"
        directory.mkdir()
        with running_gateway(jupyter_base / "lab-gateway") as gateway:
            # What a user clicks is also a command of the application, which has to be in the page for that.
            options = [f"--gateway-url={gateway.url}", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
            environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.tokens["alice"]}
            with running_server(directory, *options, environment=environment) as server:
                yield server, gateway


@pytest.fixture
def lab(module_lab, kernelspecs):
    """The server and its gateway, with kernelspecs."""
    return module_lab


class Page:
    """A notebook in JupyterLab, in a browser of its own."""

    def __init__(self, url: str, profile: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in [*BROWSER, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.browser = webdriver.Chrome(options=options, service=service)
        self.browser.set_page_load_timeout(READY)
        self.browser.set_script_timeout(READY)
        self.browser.get(url)

    def until(self, condition, what, *, timeout=READY):
        """Wait for the condition, which may be asked before the page is there."""
        wait = WebDriverWait(self.browser, timeout, poll_frequency=0.1, ignored_exceptions=[Exception])
        return wait.until(lambda _: condition(), f"{what}; the page has: {self.text()[-2000:]}")

    def text(self) -> str:
        return str(self.browser.find_element(By.TAG_NAME, "body").text)

    def outputs(self) -> list[str]:
        """The text of each output area."""
        return [area.text for area in self.browser.find_elements(By.CSS_SELECTOR, ".jp-Cell .jp-OutputArea-output")]

    def state(self) -> str:
        """The kernel's state, as JupyterLab knows it."""
        status = "return window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.status"
        return str(self.browser.execute_script(status))

    def until_idle(self) -> None:
        self.until(lambda: self.state() == "idle", "the kernel is not idle")

    def do(self, command: str) -> None:
        """What a menu's item or a button does; returns at once."""
        self.browser.execute_script("void window.jupyterapp.commands.execute(arguments[0])", command)

    def run(self, number: int) -> None:
        """Select the cell with this number, and run it."""
        select = "window.jupyterapp.shell.currentWidget.content.activeCellIndex = arguments[0]"
        self.browser.execute_script(select, number)
        self.do("notebook:run-cell")

    def press(self, selector: str) -> None:
        self.until(lambda: self.browser.find_element(By.CSS_SELECTOR, selector).is_displayed(), f"no {selector}")
        self.browser.find_element(By.CSS_SELECTOR, selector).click()


@pytest.fixture
def page(lab, tmp_path):
    """The notebook, open; what the browser showed last is kept in tmp_path."""
    server, _gateway = lab
    notebook = nbf.new_notebook(cells=[nbf.new_code_cell(code) for code in (WHERE, PLOT, LOOP)])
    notebook.metadata["kernelspec"] = {"name": "slurm", "display_name": "slurm", "language": "python"}
    nbformat.write(notebook, server.log.parent / "a.ipynb")
    page = Page(f"{server.url}/lab/tree/a.ipynb?reset&token={server.token}", tmp_path / "profile")
    try:
        yield page
    finally:
        page.browser.save_screenshot(str(tmp_path / "last.png"))
        page.browser.quit()
        shutil.rmtree(tmp_path / "profile", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_notebook_in_jupyterlab_runs_on_a_node(lab, page):
    """Run a cell, see a plot, interrupt a loop, restart in the same job, and shut down, all in the browser."""
    alice = lab[1].of("alice")
    page.until_idle()
    page.run(0)
    page.until(lambda: page.outputs()[0].startswith("on c1 in "), "the first cell printed nothing")
    where = page.outputs()[0]
    (kernel,) = await alice.json("GET", "/api/kernels")
    assert where == f"on c1 in {kernel['slurm']['jobid']}"

    page.run(1)
    width = "return document.querySelector('.jp-OutputArea-output img').naturalWidth"
    page.until(lambda: page.browser.execute_script(width) > 100, "there is no plot")

    page.run(2)
    page.until(lambda: "loops" in page.outputs()[2], "the loop does not run")
    assert page.state() == "busy"
    page.do("notebook:interrupt-kernel")
    page.until(lambda: "KeyboardInterrupt" in page.text(), "the loop was not interrupted")
    page.until_idle()

    page.do("notebook:restart-clear-output")
    page.press(".jp-Dialog .jp-mod-accept")
    page.until(lambda: page.outputs() == [], "the outputs are still there")
    page.until_idle()
    page.run(0)
    page.until(lambda: page.outputs() == [where], "the cell did not run in the same job after the restart")
    assert "[1]:" in page.text()

    page.do("kernelmenu:shutdown")
    page.until(lambda: "No Kernel" in page.text(), "the kernel was not shut down")
    assert await alice.json("GET", "/api/kernels") == []
