"""The page in a real browser: what a visitor does, what is refused, and how accessible it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

pytestmark = pytest.mark.browser

TINY = {"frames": 9, "height": 128, "width": 128, "steps": 2}
LONG_MS = 60_000
TABS = ["Generate", "Masks", "Guidance", "High resolution", "Evaluate"]


@pytest.fixture(autouse=True)
def patience() -> None:
    expect.set_options(timeout=LONG_MS)


def fill(page: Page, tab: str = "generate", **values: Any) -> None:
    """Write into the fields of the size and of the options, and choose a density within reach."""
    accordion = page.get_by_role("button", name="Size, steps and seed").locator("visible=true")
    if not page.locator(f"#{tab}-steps input").is_visible():
        accordion.click()
    for name, value in values.items():
        page.locator(f"#{tab}-{name} input").fill(str(value))


def make_sparse(page: Page) -> None:
    """Let attention be sparse on the few tokens of a tiny clip."""
    page.get_by_role("button", name="Options of the methods").locator("visible=true").click()
    for label, value in (("block_size", "16"), ("min_tokens", "0"), ("dense_steps", "1")):
        page.get_by_label(label).locator("visible=true").first.fill(value)


def serious(page: Page) -> list[str]:
    """Return what axe finds serious or critical."""
    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:160] for node in one['nodes'][:3]]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ]


def times(page: Page) -> list[float]:
    return page.eval_on_selector_all("video", "clips => clips.map(clip => clip.currentTime)")


def test_generating_and_comparing(open_page):
    page = open_page()
    fill(page, **TINY)
    make_sparse(page)
    page.locator("#generate-prompt textarea").fill("a small green star moving left")
    page.locator("#generate-start").click()
    expect(page.locator("#generate-status").get_by_role("progressbar")).to_be_visible()
    expect(page.locator("#generate-start")).to_be_disabled()

    result = page.locator("#generate-result")
    expect(result.locator(".da-stats")).to_be_visible()
    expect(page.locator("#generate-start")).to_be_enabled()
    for words in ("Speed-up", "PSNR", "Attention computed", "a small green star moving left"):
        expect(result).to_contain_text(words)
    expect(result.locator(".da-matrix img")).to_be_visible()
    assert result.locator(".da-policy rect").count() == 2 * 2 * 8  # branches, steps, layers
    assert result.get_by_role("table").first.locator("tbody tr").count() == 2  # dense and sparse

    # The three clips move together.
    expect(result.locator("video")).to_have_count(3)
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    seek = result.get_by_label("Position in all clips")
    seek.fill("500")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => !v.seeking)")
    first, *others = times(page)
    assert first > 0.1
    assert others == pytest.approx([first] * 2, abs=0.02)
    play = result.locator("[data-play]")
    play.focus()
    page.keyboard.press("Enter")
    expect(play).to_have_text("Pause")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => !v.paused)")
    play.click()
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.paused)")

    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    result.get_by_role("button", name="Copy as Python").click()
    expect(result.locator("[data-copy]")).to_have_text("Copied")
    code = page.evaluate("navigator.clipboard.readText()")
    compile(code, "copied", "exec")
    assert "a small green star moving left" in code
    assert "accelerate_pipeline(pipe, 'gna'" in code
    assert serious(page) == []

    # The gallery outlives the page, and brings the result back.
    page.reload()
    page.locator("#generate-gallery [data-pick]").click()
    expect(result).to_contain_text("a small green star moving left")


def test_choosing_for_a_budget_or_safely(open_page):
    page = open_page()
    fill(page, **TINY)
    page.get_by_label("Generate densely too, and compare").uncheck()
    page.get_by_label("Automatic, for a budget").check()
    expect(page.get_by_label("Density: share").locator("visible=true")).to_have_count(0)
    options = page.get_by_role("button", name="Options of the methods").locator("visible=true")
    expect(options).to_have_count(0)
    page.get_by_label("Budget", exact=True).locator("visible=true").click()
    page.get_by_role("option", name="Speed-up").click()
    amount = page.locator("#generate-amount input")
    expect(amount).to_have_value("1.5")
    assert serious(page) == []
    alert = page.locator("#generate-status").get_by_role("alert")
    for value, words in (
        ("", "target_speedup is empty"),
        ("1", "over 1"),
        ("900", "take 0 to 100"),
    ):
        amount.fill(value)
        page.locator("#generate-start").click()
        expect(alert).to_contain_text(words)

    # Settings are tried, which can be seen and stopped.
    amount.fill("99")
    page.locator("#generate-start").click()
    status = page.locator("#generate-status")
    expect(status).to_contain_text(re.compile(r"Generations to try settings\s*\d+ so far"))
    page.locator("#generate-cancel").click()
    expect(status).to_contain_text("Cancelled")
    expect(page.locator("#generate-start")).to_be_enabled()

    page.get_by_label("Automatic (safe)").check()
    expect(amount.locator("visible=true")).to_have_count(0)
    page.locator("#generate-start").click()
    result = page.locator("#generate-result")
    expect(result).to_contain_text("What was chosen, and why")
    expect(page.locator("#generate-start")).to_be_enabled()
    expect(result).to_contain_text("method='auto' took 'pisa'")
    expect(result.locator("img.da-report")).to_be_visible()
    assert "accelerate_pipeline(pipe, 'auto')" in result.locator("code").inner_text()
    assert serious(page) == []


def test_cancelling_in_the_middle(open_page):
    page = open_page()
    fill(page, **{**TINY, "steps": 60})
    make_sparse(page)
    page.locator("#generate-start").click()
    status = page.locator("#generate-status")
    expect(status).to_contain_text(re.compile(r"Denoising \(dense\)\s*[1-9]\d? of 60"))
    page.locator("#generate-cancel").click()
    expect(status).to_contain_text("Cancelled")
    expect(page.locator("#generate-start")).to_be_enabled()
    assert page.locator("#generate-result .da-stats").count() == 0

    # And the next one works.
    fill(page, steps=1)
    page.get_by_label("Generate densely too, and compare").uncheck()
    page.locator("#generate-start").click()
    expect(page.locator("#generate-result .da-stats")).to_be_visible()


def test_what_is_out_of_range_gets_a_sentence(open_page):
    page = open_page()
    fill(page, **TINY)
    alert = page.locator("#generate-status").get_by_role("alert")
    for values, words in (
        ({"height": 100000}, "height=100,000 is out of range: take 16 to 256."),
        ({"height": -5}, "height=-5 is out of range: take 16 to 256."),
        ({"height": 100}, "height=100 is not a multiple of 16, as WanPipeline needs: take 96."),
        ({"height": 128, "frames": 6}, "take 5"),
        ({"frames": 9, "steps": 0}, "steps=0 is out of range: take 1 to 60."),
        ({"steps": 1.5}, "steps=1.5 is no whole number: take 2."),
    ):
        fill(page, **values)
        page.locator("#generate-start").click()
        expect(alert).to_contain_text(words)
        expect(page.locator("#generate-start")).to_be_enabled()
    fill(page, steps=1)
    page.locator("#generate-prompt textarea").fill("  ")
    page.locator("#generate-start").click()
    expect(alert).to_contain_text("the prompt is empty: say what to generate.")
    page.locator("#generate-prompt textarea").fill("red " * 400)
    page.locator("#generate-start").click()
    expect(alert).to_contain_text("characters and this page takes 1000: shorten it.")


def test_hostile_texts_are_only_texts(open_page, served):
    page = open_page()
    hostile = (
        """<img src=x onerror="window.hacked=1"></p><script>window.hacked=1</script>'"\\ {{7*7}}"""
    )
    fill(page, **{**TINY, "steps": 1})
    make_sparse(page)
    page.get_by_label("Generate densely too, and compare").uncheck()
    page.locator("#generate-prompt textarea").fill(hostile)
    page.locator("#generate-start").click()
    prompt = page.locator("#generate-result .da-prompt")
    expect(prompt).to_have_text(hostile)
    expect(page.locator("#generate-result .da-warning")).to_contain_text("knows nothing of")
    compile(page.locator("#generate-result code").inner_text(), "shown", "exec")
    assert page.evaluate("window.hacked") is None

    # A chosen result is a name to look up, never a path.
    before = page.locator("#generate-result").inner_html()
    page.evaluate(
        """name => { const input = document.querySelector('#generate-picked textarea, '
             + '#generate-picked input'); input.value = name;
             input.dispatchEvent(new Event('input', {bubbles: true})); }""",
        "../../../../etc/passwd",
    )
    fill(page, steps=0)
    page.locator("#generate-start").click()
    expect(page.locator("#generate-status").get_by_role("alert")).to_be_visible()
    assert page.locator("#generate-result").inner_html() == before


def test_two_visitors_at_once_keep_apart(open_page):
    pages = [open_page(), open_page()]
    prompts = ["a large red circle", "a small white ring"]
    for page, prompt in zip(pages, prompts, strict=True):
        fill(page, **{**TINY, "steps": 3})
        make_sparse(page)
        page.locator("#generate-prompt textarea").fill(prompt)
    for page in pages:
        page.locator("#generate-start").click()
    expect(pages[1].locator("#generate-status")).to_contain_text("1 request before yours")
    for page, mine, other in zip(pages, prompts, reversed(prompts), strict=True):
        result = page.locator("#generate-result")
        expect(result.locator(".da-prompt")).to_have_text(mine)
        expect(page.locator("#generate-gallery [data-pick]")).to_have_count(1)
        expect(page.locator("#generate-gallery")).not_to_contain_text(other)


def test_the_mask_explorer(open_page):
    page = open_page()
    page.get_by_role("tab", name="Masks").click()
    result = page.locator("#masks-result")
    expect(result).to_contain_text("What token (4, 7, 7) sees")
    expect(result.locator(".da-matrix img")).to_have_count(2)
    seen = result.locator(".da-frames img").get_attribute("src")

    box = result.locator(".da-frames").bounding_box()
    result.locator(".da-frames").click(position={"x": 4, "y": 4})
    assert box is not None
    expect(page.locator("#query-token textarea, #query-token input")).to_have_value("0, 0, 0")
    expect(result).to_contain_text("What token (0, 0, 0) sees")
    assert result.locator(".da-frames img").get_attribute("src") != seen

    page.locator("#query-token textarea, #query-token input").fill("99, 0, 0")
    expect(result.get_by_role("alert")).to_contain_text("take 0 to 8.")
    page.locator("#query-token textarea, #query-token input").fill("0, 0, 0")
    page.locator("#masks-frames input").fill("5000")
    expect(result.get_by_role("alert")).to_contain_text("take a smaller grid")
    page.locator("#masks-frames input").fill("9")
    expect(result).to_contain_text("What token (0, 0, 0) sees")
    page.get_by_label("Method", exact=True).locator("visible=true").click()
    page.get_by_role("option", name="pisa").click()
    expect(result.get_by_role("alert")).to_contain_text("no one mask to draw")


def test_heads_are_chosen_by_pressing(open_page):
    page = open_page()
    page.get_by_role("tab", name="Guidance").click()
    field = page.locator("#guidance-heads textarea, #guidance-heads input")
    expect(page.locator("[data-head]")).to_have_count(8 * 4)
    expect(page.locator("[data-head][aria-pressed=true]")).to_have_count(2)
    page.locator("[data-head='5:0']").click()
    page.locator("[data-head='2:3']").focus()
    page.keyboard.press("Space")
    expect(field).to_have_value("5:1, 2:3")
    field.fill("1:1")
    expect(page.locator("[data-head][aria-pressed=true]")).to_have_count(1)

    field.fill("../heads.json")
    fill(page, "guidance", **{**TINY, "steps": 1})
    page.locator("#guidance-start").click()
    alert = page.locator("#guidance-status").get_by_role("alert")
    expect(alert).to_contain_text("write layer:head, such as 5:0, 5:1.")
    field.fill("1:1")
    page.locator("#guidance-start").click()
    expect(page.locator("#guidance-result .da-stats")).to_be_visible()


def test_an_evaluation_is_followed_and_its_report_opens(open_page):
    page = open_page()
    page.get_by_role("tab", name="Evaluate").click()
    page.get_by_label("pisa").uncheck()
    page.locator("#eval-prompts input").fill("1")
    page.get_by_role("button", name="Size and steps").click()
    for name, value in {**TINY, "steps": 1}.items():
        page.locator(f"#eval-{name} input").fill(str(value))
    page.locator("#eval-density input, #eval-density textarea").fill("0.4;0.5")
    page.locator("#eval-start").click()
    status = page.locator("#eval-status")
    expect(status.get_by_role("alert")).to_contain_text("write numbers in (0, 1] with commas")
    page.locator("#eval-density input, #eval-density textarea").fill("")
    page.locator("#eval-start").click()
    link = page.locator("#eval-result").get_by_role("link", name="Open the report")
    expect(link).to_be_visible()
    with page.expect_popup() as opened:
        link.click()
    expect(opened.value.locator("body")).to_contain_text("gna")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_tab_is_accessible(open_page, scheme):
    page = open_page(color_scheme=scheme)
    for tab in TABS:
        page.get_by_role("tab", name=tab).click()
        page.get_by_role("tabpanel").locator("visible=true").first.wait_for()
        assert serious(page) == [], tab


def test_nothing_slides_for_those_who_asked_for_less_motion(open_page):
    lasting = (
        "[...document.querySelectorAll('button')].map(b => getComputedStyle(b).transitionDuration)"
    )
    assert set(open_page(reduced_motion="no-preference").evaluate(lasting)) != {"0s"}
    assert set(open_page().evaluate(lasting)) == {"0s"}


def test_a_phone_is_wide_enough(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True)
    for tab in TABS:
        found = page.get_by_role("tab", name=tab)
        if not found.is_visible():  # the last ones lie behind a button
            page.locator(".overflow-menu button").first.click()
            page.get_by_role("button", name=tab).locator("visible=true").last.click()
        else:
            found.click()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, tab
