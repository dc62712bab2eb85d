"""JupyterLab in a browser, on a Jupyter server whose kernels are the gateway's."""

from __future__ import annotations

import pytest

from helpers.gateway_process import running_gateway
from helpers.jupyterlab import LAB_OPTIONS, Page, write_notebook
from helpers.kernel_clients import jupyter_files_in
from helpers.notebook_server import running_server

WHERE = "import os; print('on', os.environ['SLURMD_NODENAME'], 'in', os.environ['SLURM_JOB_ID'])"
PLOT = "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.plot([1, 4, 9]);"
LOOP = "import time\nprint('loops', flush=True)\nwhile True:\n    time.sleep(0.1)"


@pytest.fixture(scope="module")
def module_lab(cluster, jupyter_base):
    """A Jupyter server with JupyterLab, and its gateway."""
    with jupyter_files_in(jupyter_base):
        directory = jupyter_base / "lab"
        directory.mkdir()
        with running_gateway(jupyter_base / "lab-gateway") as gateway:
            options = [f"--gateway-url={gateway.url}", *LAB_OPTIONS]
            environment = {"JUPYTER_GATEWAY_AUTH_TOKEN": gateway.tokens["alice"]}
            with running_server(directory, *options, environment=environment) as server:
                yield server, gateway


@pytest.fixture
def lab(module_lab, kernelspecs):
    """The server and its gateway, with kernelspecs."""
    return module_lab


@pytest.fixture
def page(lab, tmp_path):
    """The notebook, open; what the browser showed last is kept in tmp_path."""
    server, _gateway = lab
    write_notebook(server, "a.ipynb", "slurm", WHERE, PLOT, LOOP)
    page = Page(server, tmp_path / "profile")
    page.open("a.ipynb")
    try:
        yield page
    finally:
        page.browser.save_screenshot(str(tmp_path / "last.png"))
        page.close()


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
