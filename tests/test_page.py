"""The page, in a headless browser that has no network: what people do there.

Most of it runs against `page_server`, whose model writes what the question says, at the speed that the test needs; the
last tests ask tiny-llava, through `local-llava serve`.
"""

from __future__ import annotations

import hashlib
import io
import re
from pathlib import Path

import httpx
import scenes
import server_process
import tiny_world
from page_actions import (
    Server,
    add,
    answered,
    answers,
    ask,
    echo,
    opened,
    png,
    scripted_server,
    until,
)
from playwright.sync_api import Browser, Page, expect


def test_a_picture_is_asked_about_and_the_model_gets_its_very_bytes(page: Page) -> None:
    add(page)
    answer = answered(page, "echo")
    digest = hashlib.sha256(png()).hexdigest()
    assert echo(answer)["messages"] == [["user", "echo", [digest]]]
    expect(answer.locator(".llava-note")).to_contain_text("s to the first")
    expect(answer.locator(".llava-note")).to_contain_text("picture read in 0.1 s")
    expect(page.get_by_role("button", name="Leave out scene.png")).to_have_count(0)
    expect(page.get_by_role("textbox", name="Question")).to_have_value("")
    again = answered(page, "echo", 2)
    expect(again.locator(".llava-note")).to_contain_text("picture known already (590 of 600 tokens reused)")
    assert [message[0] for message in echo(again)["messages"]] == ["user", "assistant", "user"]


def test_pictures_are_dropped_pasted_photographed_and_left_out(page: Page) -> None:
    transfer = page.evaluate_handle(
        """(bytes) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
            return transfer;
        }""",
        list(png(2)),
    )
    page.dispatch_event("body", "dragover", {"dataTransfer": transfer})
    expect(page.locator("body")).to_have_class(re.compile("llava-dropping"))
    page.dispatch_event("body", "drop", {"dataTransfer": transfer})
    expect(page.get_by_role("img", name="Picture dropped.png")).to_be_visible()
    expect(page.locator("body")).not_to_have_class(re.compile("llava-dropping"))

    page.evaluate(
        """(bytes) => {
            const clipboardData = new DataTransfer();
            clipboardData.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
            document.body.dispatchEvent(new ClipboardEvent("paste", { clipboardData, bubbles: true }));
        }""",
        list(png(3)),
    )
    expect(page.get_by_role("img", name="Picture pasted.png")).to_be_visible()

    page.get_by_role("button", name="Take a picture").click()
    page.get_by_role("button", name="Take the picture").click()
    expect(page.get_by_role("img", name="Picture photo.png")).to_be_visible()
    expect(page.get_by_role("dialog", name="Camera")).to_have_count(0)

    page.get_by_role("button", name="Leave out photo.png").click()
    expect(page.get_by_role("img", name="Picture photo.png")).to_have_count(0)
    digests = [hashlib.sha256(png(seed)).hexdigest() for seed in (2, 3)]
    assert echo(answered(page, "echo"))["messages"] == [["user", "echo", digests]]


def test_an_answer_streams_and_is_stopped(page: Page, server: Server) -> None:
    ask(page, "count 500")
    answer = answers(page).last
    expect(answer).to_contain_text("word3")
    expect(answer).to_have_attribute("aria-busy", "true")
    page.get_by_role("button", name="Stop").click()
    expect(answer.locator(".llava-note")).to_have_text("stopped")
    until(lambda: httpx.get(server.url + "/running").json() == 0, "the model still writes")
    assert "word499" not in answer.inner_text()
    ask(page, "count 500")
    expect(answers(page).last).to_contain_text("word2")
    page.keyboard.press("Escape")
    expect(answers(page).last.locator(".llava-note")).to_have_text("stopped")


def test_an_answer_is_given_again_and_a_question_edited(page: Page) -> None:
    add(page)
    first = echo(answered(page, "echo"))
    answered(page, "echo", 2)
    expect(page.get_by_role("button", name="Answer again")).to_have_count(1)
    page.get_by_role("button", name="Answer again").click()
    expect(answers(page).last.locator(".llava-text")).to_contain_text('"seed": 1')
    expect(answers(page)).to_have_count(2)

    page.get_by_role("button", name="Edit").first.click()
    box = page.get_by_role("textbox", name="Edited question")
    expect(box).to_have_value("echo")
    box.fill("echo please")
    page.get_by_role("article").get_by_role("button", name="Ask").click()
    expect(answers(page)).to_have_count(1)
    expect(answers(page).last).to_contain_text("echo please")
    expect(answers(page).last.locator(".llava-note")).to_contain_text("to the first")
    edited = echo(answers(page).last)
    assert edited["messages"] == [["user", "echo please", first["messages"][0][2]]]

    page.get_by_role("button", name="Edit").click()
    page.get_by_role("textbox", name="Edited question").press("Escape")
    expect(page.get_by_role("textbox", name="Edited question")).to_have_count(0)


def test_an_error_is_one_line_and_what_there_is_of_the_answer_stays(page: Page) -> None:
    ask(page, "fail 3")
    alert = answers(page).last.get_by_role("alert")
    expect(alert).to_have_text("the model's process ended; it is started again")
    expect(answers(page).last).to_contain_text("word0 word1 word2")
    page.reload()
    expect(alert).to_have_text("the model's process ended; it is started again")
    answered(page, "write well", 2)


def test_too_many_and_too_large_pictures_are_said_no_to(page: Page) -> None:
    for i in range(4):
        add(page, f"{i}.png", png(i))
    page.locator("input[type=file]").first.set_input_files(
        {"name": "fifth.png", "mimeType": "image/png", "buffer": png(5)}
    )
    alert = page.get_by_role("contentinfo").get_by_role("alert")
    expect(alert).to_have_text("fifth.png is left out: a question can have 4 pictures")
    answered(page, "echo")
    page.locator("input[type=file]").first.set_input_files(
        {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 3_000_001}
    )
    expect(alert).to_have_text("large.png is larger than 3 MB, which the server takes")


def test_what_the_browser_cannot_show_is_named(page: Page) -> None:
    add(page, "scan.pdf", b"%PDF-1.4 not really")
    expect(page.get_by_role("img", name="Picture scan.pdf")).to_have_text("scan.pdf")
    assert echo(answered(page, "echo"))["messages"][0][2] == [hashlib.sha256(b"%PDF-1.4 not really").hexdigest()]


def test_conversations_survive_a_reload_another_tab_and_the_server(page: Page, server: Server) -> None:
    add(page)
    answered(page, "echo this")
    page.reload()
    expect(answers(page)).to_have_count(1)
    picture = page.get_by_role("img", name="Picture scene.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("(image) => image.naturalWidth") == scenes.SIZE

    page.get_by_role("button", name="New conversation").click()
    expect(answers(page)).to_have_count(0)
    answered(page, "write other")
    server.stop()
    server.start()
    tab = page.context.new_page()
    tab.goto(server.url)
    titles = tab.get_by_role("navigation", name="Conversations").get_by_role("listitem")
    expect(titles).to_have_count(2)
    tab.get_by_role("button", name="echo this", exact=True).click()
    second = answered(tab, "echo", 2)
    assert echo(second)["messages"][0][2] == [hashlib.sha256(png()).hexdigest()]

    tab.get_by_role("button", name="Delete echo this").click()
    tab.get_by_role("dialog").get_by_role("button", name="Delete", exact=True).click()
    expect(titles).to_have_count(1)
    expect(answers(tab)).to_have_count(0)
    left = """async () => {
        const db = await new Promise((done) => {
            const opening = indexedDB.open("local-llava");
            opening.onsuccess = () => done(opening.result);
        });
        const count = (name) => new Promise((done) => {
            const counting = db.transaction(name).objectStore(name).count();
            counting.onsuccess = () => done(counting.result);
        });
        return [await count("conversations"), await count("pictures")];
    }"""
    assert tab.evaluate(left) == [1, 0]
    # The first tab finds the new server, too, and shows what it showed before.
    expect(answers(page)).to_have_count(1)
    expect(answers(page).last).to_contain_text("other")


def test_an_answer_that_is_left_stops_and_is_kept_as_far_as_it_came(page: Page, server: Server) -> None:
    ask(page, "count 500")
    expect(answers(page).last).to_contain_text("word50", timeout=30_000)
    page.reload()
    until(lambda: httpx.get(server.url + "/running").json() == 0, "the model writes for nobody", seconds=3)
    expect(answers(page).last).to_contain_text("word10")
    expect(answers(page).last.locator(".llava-note")).to_have_text("not finished")


def test_settings_reach_the_model_and_survive_a_reload(page: Page) -> None:
    assert echo(answered(page, "echo"))["options"] == {"max_tokens": 200, "seed": 0}
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.7")
    tokens = page.get_by_label("Tokens of an answer, at most")
    tokens.fill("0.5")
    expect(page.get_by_role("dialog").get_by_text("max_tokens must be a whole number, not 0.5")).to_be_visible()
    tokens.fill("64")
    page.get_by_role("combobox", name="What the model sees of a picture").click()
    page.get_by_role("option", name="The whole picture, with bars").click()
    page.get_by_role("combobox", name="Appearance").click()
    page.get_by_role("option", name="Dark").click()
    expect(page.locator("body")).to_have_class(re.compile("body--dark"))
    page.get_by_role("button", name="Done").click()
    page.get_by_role("combobox", name="Model", exact=True).click()
    page.get_by_role("option", name="second:F16").click()
    expect(page.get_by_role("listbox")).to_have_count(0)

    for n in (2, 3):
        found = echo(answered(page, "echo", n))
        assert found["model"] == "second:F16"
        assert found["options"] == {
            "system": "Be brief.",
            "temperature": 0.7,
            "max_tokens": 64,
            "preprocess": "pad",
            "seed": 0,
        }
        page.reload()
        expect(page.locator("body")).to_have_class(re.compile("body--dark"))
        expect(answers(page)).to_have_count(n)


def test_answers_are_rendered_and_run_nothing(page: Page) -> None:
    text = "**bold** <img src=x onerror=\"document.title='run'\"> ![far](http://example.com/x.png) <script>1</script>"
    answer = answered(page, "write " + text)
    expect(answer.locator("strong")).to_have_text("bold")
    expect(answer.locator("img, script")).to_have_count(0)
    ask(page, "<b>typed</b>")
    expect(page.get_by_role("article", name="Question").last).to_contain_text("<b>typed</b>")
    assert page.title() == "local-llava"
    refused = "() => fetch('http://example.com/').then(() => 'let out', () => 'refused')"
    assert page.evaluate(refused) == "refused"


def test_an_answer_is_copied(page: Page) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answered(page, "write **as written**").get_by_role("button", name="Copy").click()
    page.wait_for_function("async () => (await navigator.clipboard.readText()) === '**as written**'")


def test_nothing_is_written_and_no_file_is_served_but_the_pages_own(page: Page, server: Server) -> None:
    add(page, "large.png", png() + b"x" * 2_500_000)
    answered(page, "echo")
    assert server.files() == []
    with httpx.Client(base_url=server.url) as client:
        top = client.get("/")
        policy = top.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "http" not in policy
        assert "set-cookie" not in top.headers
        assert re.findall(r"https?://[^\s\"'<]+", top.text.replace("http://www.w3.org", "")) == []
        prefix = re.search(r"/_nicegui/[0-9.]+", top.text)
        assert prefix
        for path in ("/static/", "/static/fonts/", "/libraries/", "/components/", "/resources/x/", "/esm/x/"):
            for tail in ("../../../../../../../etc/passwd", "%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "/etc/passwd"):
                answer = client.get(prefix[0] + path + tail)
                assert answer.status_code in (403, 404), path + tail
        assert client.get("/etc/passwd").json() == {"detail": "Not Found"}
        assert client.post("/page/pictures/nobody/x", content=b"x").status_code == 404
        assert client.post("/_nicegui/client/x/upload/1").status_code == 404
        for origin in ("http://evil.example", "null"):
            assert client.get("/_nicegui_ws/socket.io/?EIO=4&transport=polling", headers={"Origin": origin}).is_error


def test_the_page_works_with_a_key_and_an_answer_that_takes_too_long_ends(chromium: Browser, tmp_path: Path) -> None:
    key = {"username": "anyone", "password": "a-key"}
    with scripted_server(tmp_path, api_key="a-key", request_timeout_s=2) as locked:
        for page in opened(chromium, locked.url, http_credentials=key):
            add(page)
            answered(page, "echo")
            ask(page, "count 500")
            expect(answers(page).last.get_by_role("alert")).to_have_text("the answer took too long")
            expect(answers(page).last).to_contain_text("word9")


# tiny-llava.


def test_tiny_llava_answers_on_the_page(chromium: Browser) -> None:
    asked = tiny_world.questions(3, 1, 3)
    data = io.BytesIO()
    asked[0].picture.save(data, "PNG")
    with server_process.running() as real:
        _ask_tiny_llava(chromium, real.url, data.getvalue(), asked)


def _ask_tiny_llava(chromium: Browser, url: str, picture: bytes, asked: list[tiny_world.Asked]) -> None:
    for page in opened(chromium, url):
        add(page, "scene.png", picture)
        for n, question in enumerate(asked, 1):
            expect(answered(page, question.question, n).locator(".llava-text")).to_have_text(question.answer)
        expect(answers(page).last.locator(".llava-note")).to_contain_text("picture known already")
        page.get_by_role("button", name="New conversation").click()
        add(page, "broken.png", b"no picture")
        ask(page, "What is it?")
        expect(answers(page).last.get_by_role("alert")).to_contain_text("picture")
