"""A notebook in JupyterLab, in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import nbformat.v4 as nbf
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from helpers.kernel_clients import READY
from helpers.notebook_server import Server

# What a user clicks is also a command of the application, which has to be in the page for that.
LAB_OPTIONS = ["--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
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


def write_notebook(server: Server, name: str, kernel: str, *cells: str) -> None:
    """Write a notebook for this kernelspec into the server's directory."""
    notebook = nbf.new_notebook(cells=[nbf.new_code_cell(code) for code in cells])
    notebook.metadata["kernelspec"] = {"name": kernel, "display_name": kernel, "language": "python"}
    nbformat.write(notebook, server.log.parent / name)


class Page:
    """JupyterLab of ``server``, in a browser of its own with its files in ``profile``; its maker calls ``close``."""

    def __init__(self, server: Server, profile: Path) -> None:
        self.server, self._profile = server, profile
        options = webdriver.ChromeOptions()
        options.binary_location = str(shutil.which("chromium"))
        for argument in [*BROWSER, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        service = webdriver.ChromeService(executable_path=shutil.which("chromedriver"))
        self.browser = webdriver.Chrome(options=options, service=service)
        self.browser.set_page_load_timeout(READY)
        self.browser.set_script_timeout(READY)

    def close(self) -> None:
        """End the browser."""
        self.browser.quit()
        shutil.rmtree(self._profile, ignore_errors=True)

    def open(self, name: str) -> None:
        """Open one notebook, and nothing that was open before."""
        self.browser.get(f"{self.server.url}/lab/tree/{quote(name)}?reset&token={self.server.token}")

    def until(self, condition: Callable[[], Any], what: str, *, timeout: float = READY) -> Any:
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
