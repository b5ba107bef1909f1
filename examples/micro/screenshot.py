"""Takes docs/images/web.png: `mimo demo --web` in a headless Chromium, after two questions about the shipped media.

    python examples/micro/screenshot.py docs/images/web.png [--dark]

Needs the extra web, selenium, and Chromium with its chromedriver.
"""

import argparse
import io
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait


SIZE = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
# seconds for an answer
PATIENCE = 120
# labels of the examples to ask, and whether their answers are drafted; the last one stays on the page
QUESTIONS = [("by heart", False), ("by heart", True), ("clip+sound", True)]
IDLE = "#box .submit-button:not([disabled])"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path, help="PNG to write")
    parser.add_argument("--dark", action="store_true", help="the dark theme")
    args = parser.parse_args()
    command = [sys.executable, "-m", "modeling_mimo.cli.main", "demo", "--web", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        # "MiMo-Micro is at http://127.0.0.1:PORT; Ctrl-C stops."
        address = server.stdout.readline().split()[3].rstrip(";")
        png = photographed(f"{address}?__theme={'dark' if args.dark else 'light'}")
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
    # few colours: a third of the bytes
    args.out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def photographed(address: str) -> bytes:
    """PNG of the page after QUESTIONS."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome")
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver"))) as browser:
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", SIZE)
        browser.get(address)
        wait = WebDriverWait(browser, PATIENCE)
        wait.until(lambda _: browser.find_elements("css selector", IDLE))
        for label, drafted in QUESTIONS:
            browser.find_element("id", "new").click()
            wait.until(lambda _: "empty" in browser.find_element("id", "cache").text)
            switch = browser.find_element("css selector", "#draft input")
            if switch.is_selected() != drafted:
                switch.click()
            browser.find_element("xpath", f"//*[@id='examples']//button[normalize-space()='{label}']").click()
            # it is not idle from before the first token on
            wait.until(lambda _: "empty" not in browser.find_element("id", "cache").text)
            wait.until(lambda _: browser.find_elements("css selector", IDLE))
        # videos load behind the answer
        wait.until(
            lambda _: browser.execute_script("return [...document.querySelectorAll('video')].every(v => v.readyState)")
        )
        browser.execute_script("document.activeElement.blur()")
        return browser.get_screenshot_as_png()


if __name__ == "__main__":
    main()
