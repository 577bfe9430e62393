"""The documentation preview: built, checked, and opened in a real browser."""

import json
import os
import re
import stat

import pytest

from papers10.core import site

# The whole book is built once, which takes minutes on a slow machine and counts for the first test that asks for it.
pytestmark = pytest.mark.timeout(1200)

FLAGS = [
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--window-size=1400,1000",
]

LOOK = """
const done = arguments[arguments.length - 1];
const pictures = [...document.querySelectorAll('main img')];
pictures.forEach(picture => { picture.loading = 'eager'; });
Promise.allSettled(pictures.map(picture => picture.decode())).then(() => done({
  title: document.title,
  pictures: pictures.length,
  broken: pictures.filter(picture => !picture.naturalWidth).map(picture => picture.getAttribute('src').slice(0, 80)),
  formulas: document.querySelectorAll('main math').length,
  flat: [...document.querySelectorAll('main math')].filter(formula => {
    const box = formula.getBoundingClientRect();
    return formula.checkVisibility() && !formula.closest('details:not([open])') && (box.width < 2 || box.height < 4);
  }).length,
  display: [...new Set([...document.querySelectorAll('main math')].map(formula => getComputedStyle(formula).display))],
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  wide: [...document.querySelectorAll('main *')].filter(element =>
    element.getBoundingClientRect().right > document.documentElement.clientWidth + 1 &&
    !element.closest('pre, .table-scroll, math, svg, details:not([open]), [style*="overflow"]')
  ).slice(0, 3).map(element => element.outerHTML.slice(0, 120)),
  headings: document.querySelectorAll('main h1').length,
  words: document.querySelector('main').innerText.length,
  contents: document.querySelectorAll('.contents a').length,
  links: [...document.querySelectorAll('a[href]')].map(link => link.href).filter(link => link.startsWith(location.origin)),
}));
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return site.build(tmp_path_factory.mktemp("docs") / "site", quarto="never")


@pytest.fixture(scope="module")
def address(built):
    server = site.serve(built)
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture(scope="module")
def names(built):
    return sorted(path.relative_to(built).as_posix() for path in built.rglob("*.html"))


@pytest.fixture(scope="module")
def seen(browser, address, names):
    """What a desktop browser saw on every page, with its console and the requests it made."""
    found = {}
    for name in names:
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(f"{address}/{name}")
        found[name] = browser.execute_async_script(LOOK)
        found[name]["console"] = [
            entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"
        ]
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        found[name]["outside"] = [
            url for url in requests if not url.startswith((address, "data:", "chrome", "about:", "blob:"))
        ]
    return found


def test_nothing_is_broken(built):
    assert site.check(built) == []


def test_links_to_source_name_a_line(built):
    assert [page.name for page in built.rglob("*.html") if re.search(r'href="[^"]*#LNone', page.read_text())] == []


def test_tables_link_where_a_capability_is_shown_and_give_text_room():
    import bs4

    html = (
        "<table><tr><td>delta update with one value channel</td><td>tests/house/test_site.py::test_nothing_is_broken<br>"
        "01_operator#Two forms<br>01_operator#No such<br>tests/absent.py::test_x</td><td>7</td></tr></table>"
    )
    soup = bs4.BeautifulSoup(html, "html.parser")
    address = {"04_x/index.ipynb": "04_x/index.html", "04_x/01_operator.ipynb": "04_x/operator.html"}
    site._link_targets(soup, "04_x/index.ipynb", address, {"04_x/operator.html": {"two-forms"}})
    site._widen_columns(soup)
    first, second, third = soup.find_all("td")
    links = [link["href"] for link in second.find_all("a")]
    assert len(links) == 2 and links[0].endswith("/tests/house/test_site.py") and links[1] == "operator.html#two-forms"
    assert (
        first["style"] == "min-width:8.75em" and "overflow-wrap:anywhere" in second["style"] and not third.get("style")
    )


def test_every_notebook_is_a_page(built, names):
    assert len(names) == len(site.notebooks())
    text = (built / "index.html").read_text()
    assert all(f'href="{name}"' in text for name in names)


def test_search_index_covers_headings_and_text(built):
    text = (built / "assets" / "search-index.js").read_text()
    entries = json.loads(text.removeprefix("window.SEARCH_INDEX = ").rstrip().rstrip(";"))
    assert len({entry["u"].partition("#")[0] for entry in entries}) == len(list(built.rglob("*.html")))
    assert any("householder" in (entry["h"] + entry["x"]).lower() for entry in entries)


def test_reference_entries_stand_before_their_source(built):
    text = (built / "shared" / "core" / "site.html").read_text()
    assert 0 < text.index('id="docstring_sections"') < text.index("def</span> docstring_sections")
    assert "<strong>Args</strong>" in text


@pytest.mark.browser
@pytest.mark.slow
class TestInChromium:
    def test_pages_open_without_console_errors_and_without_the_network(self, seen):
        assert {name: page["console"] for name, page in seen.items() if page["console"]} == {}
        assert {name: page["outside"] for name, page in seen.items() if page["outside"]} == {}

    def test_every_page_has_a_title_one_heading_and_text(self, seen):
        assert [name for name, page in seen.items() if page["headings"] != 1 or page["words"] < 300] == []
        assert len({page["title"] for page in seen.values()}) == len(seen)

    def test_every_link_inside_the_site_resolves(self, seen, built, address):
        broken = set()
        for name, page in seen.items():
            for link in page["links"]:
                target = link.removeprefix(address).lstrip("/").partition("#")[0] or "index.html"
                if not (built / target).is_file():
                    broken.add((name, link))
        assert broken == set()

    def test_mathematics_is_drawn_as_mathml(self, seen):
        assert sum(page["formulas"] for page in seen.values()) > 50
        assert {name: page["flat"] for name, page in seen.items() if page["flat"]} == {}
        assert {word for page in seen.values() for word in page["display"]} <= {"math", "block math", "inline math"}

    def test_figures_load(self, seen):
        assert sum(page["pictures"] for page in seen.values()) > 5
        assert {name: page["broken"] for name, page in seen.items() if page["broken"]} == {}

    def test_a_telephone_needs_no_horizontal_scrolling(self, browser, address, names):
        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            wide = {}
            for name in names:
                browser.get(f"{address}/{name}")
                page = browser.execute_async_script(LOOK)
                if page["overflow"] > 0:
                    wide[name] = page["wide"]
            assert wide == {}
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})

    @pytest.mark.parametrize("scheme", ["http", "file"])
    def test_search_finds_householder_and_leads_there(self, browser, address, built, scheme):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        browser.get(
            f"{address}/shared/core/site.html" if scheme == "http" else (built / "shared/core/site.html").as_uri()
        )
        browser.find_element(By.TAG_NAME, "body").send_keys("/")
        field = browser.switch_to.active_element
        assert field.get_attribute("id") == "search"
        field.send_keys("Householder")
        results = browser.find_elements(By.CSS_SELECTOR, "#results a")
        assert results and any("deep_delta_learning" in result.get_attribute("href") for result in results)
        assert any("householder" in result.text.lower() for result in results)
        first = results[0].get_attribute("href")
        field.send_keys(Keys.ENTER)
        assert browser.current_url == first
        assert "householder" in browser.find_element(By.TAG_NAME, "main").text.lower()

    def test_search_says_when_there_is_nothing(self, browser, address):
        from selenium.webdriver.common.by import By

        browser.get(address)
        browser.find_element(By.ID, "search").send_keys("qqxxyyzz")
        assert "Nothing found" in browser.find_element(By.ID, "results").text

    def test_theme_switches_and_is_remembered(self, browser, address):
        from selenium.webdriver.common.by import By

        def background():
            return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

        browser.get(address)
        before = background()
        browser.find_element(By.ID, "theme").click()
        after = background()
        assert after != before
        browser.get(f"{address}/start/quickstart.html")
        assert background() == after
        browser.execute_script("localStorage.clear()")

    def test_claims_can_be_filtered(self, browser, address):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.support.ui import Select

        browser.get(f"{address}/results.html")
        box = browser.find_element(By.CSS_SELECTOR, ".filterable")
        rows = box.find_elements(By.CSS_SELECTOR, "tr[data-verdict]")

        def shown():
            visible = [row for row in rows if row.is_displayed()]
            assert box.find_element(By.TAG_NAME, "output").text == f"{len(visible)} of {len(rows)}"
            return visible

        assert len(shown()) == len(rows)
        box.find_element(By.CSS_SELECTOR, ".filter input").send_keys("negative eigenvalue")
        found = shown()
        assert 0 < len(found) < len(rows) and all("negative eigenvalue" in row.text for row in found)
        verdict = found[0].get_attribute("data-verdict")
        Select(box.find_elements(By.TAG_NAME, "select")[-1]).select_by_visible_text(verdict)
        assert 0 < len(shown()) <= len(found) and all(row.get_attribute("data-verdict") == verdict for row in shown())

    def test_menu_opens_on_a_telephone(self, browser, address):
        from selenium.webdriver.common.by import By

        metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        try:
            browser.get(address)
            pages = browser.find_element(By.ID, "pages")
            assert not pages.is_displayed()
            browser.find_element(By.ID, "menu").click()
            assert pages.is_displayed()
        finally:
            browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def fake_quarto(folder, log: str, *, code: int = 0):
    """A stand-in for Quarto that writes one page and says `log`: the calls and the reading of warnings are ours."""
    program = folder / "quarto"
    program.write_text(
        f"#!/bin/sh\nmkdir -p _docs; echo '<p>site</p>' > _docs/index.html; cp nbdev.yml _docs/; echo '{log}' >&2; exit {code}\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


def with_quarto(monkeypatch, folder, log, code=0):
    monkeypatch.setenv("PATH", fake_quarto(folder, log, code=code)["PATH"])


def test_quarto_is_used_when_it_is_there(built, monkeypatch, tmp_path):
    with_quarto(monkeypatch, tmp_path, "rendered")
    out = site.build(tmp_path / "site", quarto="always")
    assert (out / "index.html").read_text().strip() == "<p>site</p>"
    settings = (out / "nbdev.yml").read_text()
    assert "repo-url: https://github.com/papers10/papers10" in settings and "output-dir: _docs" in settings


def test_an_unresolved_reference_stops_the_quarto_build(built, monkeypatch, tmp_path):
    with_quarto(monkeypatch, tmp_path, "WARN: Unable to resolve crossref @fig-x")
    with pytest.raises(RuntimeError, match="@fig-x"):
        site.build(tmp_path / "site", quarto="always")
    assert not (tmp_path / "site").exists()


def test_a_failing_quarto_is_reported(built, monkeypatch, tmp_path):
    with_quarto(monkeypatch, tmp_path, "ERROR: bad front matter", code=1)
    with pytest.raises(RuntimeError, match="bad front matter"):
        site.build(tmp_path / "site", quarto="always")


def test_insisting_on_an_absent_quarto_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="quarto"):
        site.build(tmp_path / "site", quarto="always")


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="not a site"):
        site.build(tmp_path, quarto="never")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_check_needs_a_site(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape("index.html")):
        site.check(tmp_path)
    with pytest.raises(FileNotFoundError):
        site.serve(tmp_path)


def test_unknown_word_for_quarto_is_refused(tmp_path):
    with pytest.raises(ValueError, match="auto, always or never, got 'perhaps'"):
        site.build(tmp_path / "site", quarto="perhaps")
