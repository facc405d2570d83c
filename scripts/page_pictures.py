"""Takes the pictures of the page that the README shows: tiny-llava, asked about a scene of its own.

    python scripts/page_pictures.py

writes docs/images/page-light.png, page-dark.png and page-phone.png. It needs the development extra.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "models" / "tiny-llava")]

import scenes  # noqa: E402
import server_process  # noqa: E402
from browser import browser  # noqa: E402
from playwright.sync_api import Page, expect  # noqa: E402

SEED = "page"
QUESTIONS = ("What do you see?", "How many shapes are there?")
WIDE, PHONE = {"width": 1100, "height": 680}, {"width": 390, "height": 780}
SHOTS = {
    "light": {"viewport": WIDE, "color_scheme": "light"},
    "dark": {"viewport": WIDE, "color_scheme": "dark"},
    "phone": {"viewport": PHONE, "color_scheme": "light", "is_mobile": True, "has_touch": True},
}


def main() -> None:
    target = ROOT / "docs" / "images"
    target.mkdir(exist_ok=True)
    with server_process.running() as server, browser() as started:
        for name, how in SHOTS.items():
            page = started.new_context(**how).new_page()  # type: ignore[arg-type]
            page.goto(server.url)
            _ask(page)
            shot = Image.open(io.BytesIO(page.screenshot(animations="disabled")))
            path = target / f"page-{name}.png"
            shot.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


def _ask(page: Page) -> None:
    scene, _ = next(scenes.sample_scenes(SEED, held_out=True))
    data = io.BytesIO()
    scenes.draw(scene).save(data, "PNG")
    shown = {"name": "shapes.png", "mimeType": "image/png", "buffer": data.getvalue()}
    page.locator("input[type=file]").first.set_input_files(shown)  # type: ignore[arg-type]
    expect(page.get_by_role("img", name="Picture shapes.png")).to_be_visible()
    for n, question in enumerate(QUESTIONS, 1):
        box = page.get_by_role("textbox", name="Question", exact=True)
        box.fill(question)
        box.press("Enter")
        answer = page.get_by_role("article", name="Answer").nth(n - 1)
        expect(answer.locator(".llava-note")).to_contain_text("tokens,", timeout=60_000)
    page.wait_for_timeout(500)  # for what Quasar fades in


if __name__ == "__main__":
    main()
