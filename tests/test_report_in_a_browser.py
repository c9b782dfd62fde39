"""The report in a browser: it fetches nothing, no script fails, tables sort, nothing is wider than the window."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from test_report import HOSTILE, data_set

from shared.evaluation.detections import Detections
from shared.report.compare import compare
from shared.report.report import report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="needs chromium (Debian's package `chromium`)"),
]

# what a user would do: click the head of a column, twice
PROBE = """<script>
const sorted = table => [...table.tBodies[0].rows].map(row => row.cells[%(column)d].textContent.trim());
const table = document.querySelector("table.sortable");
const button = table.tHead.rows[0].cells[%(column)d].querySelector("button");
button.click(); const down = sorted(table); button.click(); const up = sorted(table);
document.title = JSON.stringify({down, up, wide: document.documentElement.scrollWidth, window: innerWidth});
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A report and a comparison with hostile names in categories and files."""
    folder = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(HOSTILE)]
    boxes = [
        (image + 1, i + 1, [5 + 15 * i, 5 + 20 * j, 10, 10]) for image in range(6) for j in range(2) for i in range(6)
    ]
    annotations = data_set(folder, boxes, categories=categories, images=6)

    def found(noise):
        return [
            Detections(r.image_id, r.boxes + rng.normal(0, noise, r.boxes.shape), rng.random(len(r.boxes)), r.labels)
            for r in annotations
        ]

    report(annotations, found(2), folder / "report.html", resamples=20)
    compare(annotations, {"a": found(2), "<img src=x>": found(3)}, folder / "compare.html", resamples=20)
    return folder


def browse(page, folder, *options, width=1400):
    """The page after its scripts, and the browser's log."""
    log = folder / "net.json"
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", f"--log-net-log={log}", f"--window-size={width},1200", *options]
    done = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    return done.stdout, done.stderr, log.read_text()


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_fetches_nothing_logs_nothing_sorts_and_fits(pages, tmp_path, name, width):
    page = tmp_path / f"{name}.html"
    page.write_text((pages / f"{name}.html").read_text().replace("</body>", PROBE % {"column": 1} + "</body>"))
    dom, errors, network = browse(page, tmp_path, width=width)
    assert "CONSOLE" not in errors
    urls = set(re.findall(r'"url":"((?!data:)[^"]*)"', network))
    outside = {url for url in urls if not url.startswith(("file:", "chrome", "about:", "devtools:"))}
    # what the browser itself asks its maker for
    assert not {url for url in outside if not re.search(r"//[\w.-]*(google|gstatic|googleapis|gvt1)\.com", url)}
    assert not [url for url in urls if url.startswith("file:") and not url.endswith(f"{name}.html")]
    said = json.loads(re.search(r"<title>(.*?)</title>", dom, re.DOTALL)[1].replace("&amp;", "&"))
    numbers = [float(text) for text in said["down"] if text != "–"]
    assert numbers == sorted(numbers, reverse=True)
    assert len(numbers) > 1
    assert [float(text) for text in said["up"] if text != "–"] == sorted(numbers)
    assert said["wide"] <= said["window"]
