"""What tests of several folders share: Chromium, for those that open a page. A module says in FLAGS what its own browser needs."""

import shutil
import tempfile

import pytest

BROWSER = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
DRIVER = shutil.which("chromedriver")
COMMON = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
]


def pytest_collection_modifyitems(items):
    if BROWSER and DRIVER:
        return
    missing = pytest.mark.skip(reason="NO BROWSER: the page was NOT opened in Chromium (install chromium and chromedriver)")
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(missing)


@pytest.fixture(scope="module")
def browser(request):
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    with tempfile.TemporaryDirectory() as profile:
        options = Options()
        options.binary_location = BROWSER
        for flag in [*COMMON, *request.module.FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        driver.set_page_load_timeout(30)
        driver.set_script_timeout(30)
        yield driver
        driver.quit()
