"""Pictures of a report, as the README shows them: screenshots.py REPORT.html FOLDER."""

import sys
from pathlib import Path

from chromium import chromium
from playwright.sync_api import Page, sync_playwright


def token_view(page: Page) -> None:
    """The token view of the last response, its middle token chosen."""
    page.locator("#colour input[value=value]").check()
    page.locator(".pane .tok").nth(10).focus()
    page.locator("#tokens").evaluate("node => window.scrollTo(0, node.offsetTop - 60)")


PICTURES = (
    ("report-light", "light", (1120, 960), lambda page: None),
    ("report-dark", "dark", (1120, 960), token_view),
    ("report-phone", "light", (390, 844), token_view),
)


def main(report: Path, folder: Path) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for name, scheme, (width, height), prepare in PICTURES:
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(report.resolve().as_uri())
            prepare(page)
            page.screenshot(path=folder / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
