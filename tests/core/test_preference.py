"""core.preference: what the page holds, what a real browser makes of keys and clicks, what a CSV file is worth, and the count."""

import base64
import csv
import json
import re
import time
from collections import Counter

import pytest

from papers10.core.preference import COLUMNS, Answer, preference_page, read_answers, tally

FLAGS = ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=900,900"]
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def results(root, methods=("ours", "theirs", "third"), items=4, ending=".png"):
    folders = {}
    for method in methods:
        folders[method] = root / method
        folders[method].mkdir(parents=True)
        for item in range(items):
            (folders[method] / f"pair {item}{ending}").write_bytes(PIXEL + f"{method} {item}".encode())
    return folders


def study(path):
    return json.loads(re.search(r"^const study = (.*);$", path.read_text(), re.MULTILINE)[1])


def answer(left, right, choice, number=0, **changes):
    return Answer("page", "me", number, f"item {number}", left, right, choice, 1.0, "2026-01-01T00:00:00Z")._replace(
        **changes
    )


def written(path, answers):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for own in answers:
            writer.writerow({**own._asdict(), "winner": own.winner or ""})
    return path


class TestPage:
    def test_every_pair_of_methods_on_every_item_once(self, tmp_path):
        found = study(preference_page(tmp_path / "deep" / "a.html", results(tmp_path)))["comparisons"]
        pairs = Counter((own["item"], frozenset((own["left"], own["right"]))) for own in found)
        assert len(pairs) == 4 * 3 and set(pairs.values()) == {1}

    def test_it_holds_the_files_once_and_asks_for_nothing(self, tmp_path):
        folders = results(tmp_path)
        path = preference_page(tmp_path / "a.html", folders, title="<i>", question='</script> "which"?')
        text, found = path.read_text(), study(path)
        assert "default-src 'none'" in text and "<title>&lt;i&gt;</title>" in text and text.count("</script>") == 1
        program = re.sub(r"^const study.*$", "", text, flags=re.MULTILINE)
        assert not re.search(r"https?:|//[a-z]|@import|fetch\(|XMLHttp|sendBeacon|WebSocket", program)
        held = [base64.b64decode(file["data"]) for file in found["files"]]
        assert sorted(held) == sorted(file.read_bytes() for folder in folders.values() for file in folder.iterdir())
        for own in found["comparisons"]:
            for side, place in zip(("left", "right"), own["files"]):
                assert held[place] == (folders[own[side]] / f"{own['item']}.png").read_bytes()
        assert found["question"] == '</script> "which"?'

    def test_the_seed_decides_order_and_sides(self, tmp_path):
        folders = results(tmp_path, items=30, methods=("ours", "theirs"))
        first, same, other = (preference_page(tmp_path / f"{i}.html", folders, seed=i // 2) for i in range(3))
        assert first.read_text() == same.read_text()
        a, b = study(first), study(other)
        assert [own["item"] for own in a["comparisons"]] != [own["item"] for own in b["comparisons"]] and a["page"] != b["page"]
        assert [own["item"] for own in a["comparisons"]] != sorted(own["item"] for own in a["comparisons"])
        # 30 fair coins: outside 6..24 with a probability of 0.0003; this seed is inside.
        assert 6 <= sum(own["left"] == "ours" for own in a["comparisons"]) <= 24

    def test_against_limit_and_missing_items(self, tmp_path):
        folders = results(tmp_path)
        (folders["third"] / "pair 0.png").unlink()
        (folders["ours"] / "notes.txt").write_text("passed over")
        found = study(preference_page(tmp_path / "a.html", folders, against="ours"))["comparisons"]
        assert all("ours" in (own["left"], own["right"]) for own in found) and len(found) == 4 + 3
        assert len(study(preference_page(tmp_path / "b.html", folders, limit=2))["comparisons"]) == 2

    def test_given_files_and_a_list_of_folders(self, tmp_path):
        folders = results(tmp_path, methods=("ours", "theirs"), ending=".webm")
        given = results(tmp_path / "more", methods=("given",))["given"]
        found = study(preference_page(tmp_path / "a.html", list(folders.values()), given=given))
        assert {own["left"] for own in found["comparisons"]} <= {"ours", "theirs"}
        kinds = [(found["files"][own["given"]]["kind"], found["files"][own["files"][0]]["kind"]) for own in found["comparisons"]]
        assert set(kinds) == {("image/png", "video/webm")}

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda root, folders: {"folders": str(root)}, TypeError, "folders: expected a mapping or a list"),
            (lambda root, folders: {"folders": [folders["ours"]]}, ValueError, "at least two methods, got 1"),
            (lambda root, folders: {"folders": [folders["ours"], folders["ours"]]}, ValueError, "got two 'ours'"),
            (lambda root, folders: {"folders": {"a": root / "no", "b": root}}, FileNotFoundError, "a: no such folder"),
            (lambda root, folders: {"folders": {"a": root, "b": root}}, ValueError, "a: expected pictures or films"),
            (lambda root, folders: {"against": "our"}, ValueError, "against: .*did you mean 'ours'"),
            (lambda root, folders: {"limit": 0}, ValueError, "limit"),
            (lambda root, folders: {"max_bytes": 100}, ValueError, "max_bytes: expected a page of at most 100 bytes"),
            (lambda root, folders: {"seed": -1}, ValueError, "seed"),
            (lambda root, folders: {"given": root / "odd"}, ValueError, "given: expected a file for 'pair"),
            (lambda root, folders: {"folders": {"a": folders["ours"], "b": root / "odd"}}, ValueError, "expected files of the same name in two"),
            (lambda root, folders: {"folders": {"a": folders["ours"], "b": root / "twice"}}, ValueError, "one file for 'x'"),
        ],
    )
    def test_refusals(self, tmp_path, change, error, words):
        folders = results(tmp_path)
        for name, files in {"odd": ["other.png"], "twice": ["x.png", "x.jpg"]}.items():
            (tmp_path / name).mkdir()
            for file in files:
                (tmp_path / name / file).write_bytes(PIXEL)
        with pytest.raises(error, match=words):
            preference_page(**{"path": tmp_path / "a.html", "folders": folders, **change(tmp_path, folders)})
        assert not (tmp_path / "a.html").exists()


class TestAnswers:
    def test_there_and_back(self, tmp_path):
        many = [answer("a", 'b, "c"', choice, number) for number, choice in enumerate(("left", "right", "tie"))]
        assert read_answers(written(tmp_path / "x.csv", many)) == many
        assert [own.winner for own in many] == ["a", 'b, "c"', None]

    def test_a_folder_and_the_latest_of_two(self, tmp_path):
        early, late = (answer("a", "b", choice, at=f"2026-01-0{day}T00:00:00Z") for choice, day in (("left", 1), ("right", 2)))
        written(tmp_path / "1.csv", [late, early._replace(rater="you")])
        written(tmp_path / "2.csv", [early])
        found = read_answers(tmp_path)
        assert sorted((own.rater, own.choice) for own in found) == [("me", "right"), ("you", "left")]
        assert read_answers([tmp_path / "2.csv"]) == [early]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("a,b\n1,2\n", "expected the columns page, rater"),
            ("", "got none"),
            (",".join(COLUMNS) + "\np,r,0,i,a,b,middle,,1,t\n", "line 2, got 'middle'"),
            (",".join(COLUMNS) + "\np,r,0,i,a,b,left,b,1,t\n", "winner 'b'"),
            (",".join(COLUMNS) + "\np,r,0,i,a,a,left,a,1,t\n", "between 'a' and 'a'"),
            (",".join(COLUMNS) + "\np,r,x,i,a,b,left,a,1,t\n", "line 2, got invalid literal"),
            (",".join(COLUMNS) + "\np,r,0,i,a\n", "line 2"),
        ],
    )
    def test_refusals(self, tmp_path, text, words):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_answers(tmp_path / "x.csv")

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="expected CSV files"):
            read_answers(tmp_path)
        with pytest.raises(FileNotFoundError):
            read_answers(tmp_path / "no.csv")


class TestTally:
    def test_hand_values(self):
        choices = ["left"] * 6 + ["right"] * 2 + ["tie"] * 4
        found = tally([answer("ours", "theirs", choice, number) for number, choice in enumerate(choices)])
        (pair,) = found.pairs
        assert (pair["a"], pair["wins_a"], pair["wins_b"], pair["ties"], pair["answers"]) == ("ours", 6, 2, 4, 12)
        # Wilson, 6 of 8, z = 1.959964: (0.75 + z²/16 ± z sqrt(0.75 · 0.25/8 + z²/256)) / (1 + z²/8)
        assert (pair["share"].mean, pair["share"].n) == (0.75, 8)
        assert (pair["share"].low, pair["share"].high) == pytest.approx((0.40927, 0.92852), abs=1e-5)
        assert found.left == pair["share"] and (found.raters, found.items, found.answers) == (1, 12, 12)

    def test_sides_do_not_matter_and_methods_are_in_order(self, tmp_path):
        many = [answer("a", "b", "left", 0), answer("b", "a", "right", 1), answer("c", "a", "right", 2), answer("b", "c", "left", 3)]
        found = tally(written(tmp_path / "x.csv", many))
        assert [(record["method"], record["wins"], record["losses"]) for record in found.methods] == [("a", 3, 0), ("b", 1, 2), ("c", 0, 2)]
        assert [(pair["a"], pair["b"], pair["wins_a"]) for pair in found.pairs] == [("a", "b", 2), ("a", "c", 1), ("b", "c", 1)]
        assert found.left.mean == 0.5 and found == tally([tmp_path / "x.csv"]) == tally(many)

    def test_only_ties_have_no_share(self):
        found = tally([answer("a", "b", "tie")])
        assert found.pairs[0]["share"] is None and found.left is None and found.methods[0]["ties"] == 1

    def test_refusals(self):
        with pytest.raises(ValueError, match="answers: expected at least one"):
            tally([])
        with pytest.raises(ValueError, match="level"):
            tally([answer("a", "b", "left")], level=1.0)


@pytest.mark.browser
@pytest.mark.slow
class TestInChromium:
    def press(self, browser, *keys):
        from selenium.webdriver.common.by import By

        browser.find_element(By.TAG_NAME, "body").send_keys(*keys)

    def table(self, browser, path):
        path.write_text(browser.execute_script("return table()"), newline="")
        return read_answers(path)

    def test_keys_clicks_and_one_step_back(self, browser, tmp_path):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        path = preference_page(tmp_path / "a.html", results(tmp_path), question="Which?", seed=3)
        found = study(path)
        browser.get(path.as_uri())
        assert browser.find_element(By.ID, "question").text == "Which?"
        sizes = browser.execute_script("return Array.from(document.images, image => image.naturalWidth)")
        assert sizes == [1, 1]
        self.press(browser, "1", "2", "=", "x", "1", Keys.BACKSPACE)
        browser.find_element(By.CSS_SELECTOR, "#shown figure:last-child").click()
        browser.find_element(By.ID, "tie").click()
        answers = self.table(browser, tmp_path / "x.csv")
        assert [own.choice for own in answers] == ["left", "right", "tie", "right", "tie"]
        for own, shown in zip(answers, found["comparisons"]):
            assert (own.item, own.left, own.right, own.page) == (shown["item"], shown["left"], shown["right"], found["page"])
        assert browser.find_element(By.ID, "place").text == "5 of 12"
        assert all(0 <= own.seconds < 60 for own in answers)

    def test_the_side_shown_is_the_method_named(self, browser, tmp_path):
        folders = results(tmp_path, methods=("ours", "theirs"))
        path = preference_page(tmp_path / "a.html", folders)
        browser.get(path.as_uri())
        for own in study(path)["comparisons"]:
            held = browser.execute_script("return Array.from(document.images, image => image.src.split(',')[1])")
            assert [base64.b64decode(text) for text in held] == [
                (folders[own[side]] / f"{own['item']}.png").read_bytes() for side in ("left", "right")
            ]
            self.press(browser, "=")

    def test_answers_outlive_the_page_and_typing_a_name_is_no_answer(self, browser, tmp_path):
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        path = preference_page(tmp_path / "a.html", results(tmp_path), seed=9)
        browser.get(path.as_uri())
        self.press(browser, "2", "2")
        field = browser.find_element(By.ID, "rater")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.NULL, '1="2', Keys.TAB)
        browser.refresh()
        answers = self.table(browser, tmp_path / "x.csv")
        assert [(own.rater, own.choice) for own in answers] == [('1="2', "right")] * 2

    def test_the_end_saves_a_file_that_can_be_counted(self, browser, tmp_path):
        from selenium.webdriver.common.by import By

        path = preference_page(tmp_path / "a.html", results(tmp_path, methods=("ours", "theirs")), seed=5)
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "down")})
        browser.get(path.as_uri())
        for own in study(path)["comparisons"]:
            self.press(browser, "1" if own["left"] == "ours" else "2")
        self.press(browser, "1")  # one too many
        assert "Done" in browser.find_element(By.ID, "question").text
        browser.find_element(By.ID, "save").click()
        end = time.monotonic() + 10
        while not list((tmp_path / "down").glob("*.csv")) and time.monotonic() < end:
            time.sleep(0.05)
        found = tally(tmp_path / "down")
        assert found.methods[0]["method"] == "ours" and found.methods[0]["wins"] == found.answers == 4

    def test_nothing_is_refused_or_asked_for(self, browser):
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
