"""Takes docs/chat.png: the chat page with two models that have answered the same question. Needs a Chromium browser.

uv run python benchmarks/chat_page.py checkpoints/quickstart-chat/final checkpoints/quickstart/final
"""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="+", help="one checkpoint, or two side by side")
    parser.add_argument("--question", default="Write a story about a mole named Milo who is afraid of the dark.")
    parser.add_argument("--temperature", default="0.5")
    parser.add_argument("--seed", default="42")
    parser.add_argument("--dark", action="store_true", help="in the dark colours")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "chat.png")
    args = parser.parse_args()
    command = [sys.executable, str(ROOT / "chat.py"), args.checkpoint[0], "--web", "--port", "0"]
    command += ["--temperature", args.temperature, "--seed", args.seed]
    for other in args.checkpoint[1:2]:
        command += ["--compare", other]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8")
    try:
        assert server.stdout is not None
        address = re.search(r"http://\S+", server.stdout.readline())
        if address is None:
            raise SystemExit("the page was not served")
        names = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")
        browser_path = next((path for name in names if (path := shutil.which(name))), None)
        with sync_playwright() as playwright:
            as_root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox refuses root
            browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"] if as_root else [])
            page = browser.new_page(
                viewport={"width": 1280, "height": 800}, color_scheme="dark" if args.dark else "light"
            )
            page.set_default_timeout(300_000)
            page.goto(address.group())
            page.wait_for_selector("#question .submit-button")
            page.fill("#question textarea", args.question)
            page.press("#question textarea", "Enter")
            page.wait_for_function(
                "() => [...document.querySelectorAll('.caption .prose')].every(c => c.innerText.includes('tokens/s'))"
            )
            page.wait_for_selector("#question .submit-button")
            page.wait_for_timeout(500)  # the last of its animations
            picture = Image.open(io.BytesIO(page.screenshot()))
            browser.close()
    finally:
        server.terminate()
    picture.convert("RGB").quantize(64).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
