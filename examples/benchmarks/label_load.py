"""Many annotators at once: is a choice lost or doubled, and how long does one take?

    python examples/benchmarks/label_load.py [--annotators 20] [--choices 200] [--pause 0.25] [--db URL]

Starts `ppo-rlhf label` and sends it choices as so many browsers would, each waiting for the next pair before it chooses
again, after a pause much shorter than a person's. A choice's time is from sending it to having read the whole next
page. Exit code 1 when a choice was lost or doubled, or 95 % of them took longer than --limit.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

from ppo_rlhf.preferences import Store

FIELD = re.compile(r'type="hidden" name="(\w+)" value="([^"]*)"')
TEXT = "The **film** was, on the whole, rather good. " * 8


def annotate(address: str, name: str, count: int, pause: float) -> list[float]:
    """Judges `count` pairs over one connection; → seconds of each choice."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = {"Cookie": f"label_annotator={quote(name)}", "Content-Type": "application/x-www-form-urlencoded"}
    connection.request("GET", "/", headers=headers)
    answer = connection.getresponse()
    page = answer.read().decode()
    cookie = str(answer.getheader("Set-Cookie")).partition(";")[0]
    headers |= {"Cookie": f"{headers['Cookie']}; {cookie}", "X-Live": "1"}
    times = []
    for number in range(count):
        time.sleep(pause)
        form = urlencode(
            {**dict(FIELD.findall(page)), "result": ("left", "right", "tie")[number % 3], "seconds": "1.5"}
        )
        start = time.perf_counter()
        connection.request("POST", "/choose", form, headers)
        answer = connection.getresponse()
        page = answer.read().decode()
        times.append(time.perf_counter() - start)
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {page}")
    return times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--annotators", type=int, default=20)
    parser.add_argument("--choices", type=int, default=200, help="of each annotator")
    parser.add_argument("--pause", type=float, default=0.25, help="seconds before each choice")
    parser.add_argument("--limit", type=float, default=0.1, help="seconds that 95 %% of the choices may take at most")
    parser.add_argument("--db", help="an empty database; by default a SQLite file in a temporary folder")
    given = parser.parse_args()
    total = given.annotators * given.choices
    with tempfile.TemporaryDirectory() as folder:
        url = given.db or f"sqlite:///{folder}/labels.db"
        pairs = Path(folder) / "pairs.jsonl"
        count = total + given.annotators  # each has one more before him when he ends
        rows = [{"prompt": f"{number}: {TEXT}", "responses": [f"{TEXT} A", f"{TEXT} B"]} for number in range(count)]
        pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
        server = subprocess.Popen(
            [sys.executable, "-m", "ppo_rlhf", "label", "--pairs", str(pairs), "--db", url, "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert server.stdout is not None
            address = server.stdout.readline().removeprefix("label at ").strip()
            names = [f"annotator {number}" for number in range(given.annotators)]
            start = time.perf_counter()
            with ThreadPoolExecutor(given.annotators) as threads:
                each = threads.map(lambda name: annotate(address, name, given.choices, given.pause), names)
                times = sorted(seconds for several in each for seconds in several)
            wall = time.perf_counter() - start
        finally:
            server.kill()  # what was answered must be on disk
            server.wait()
        store = Store.open(url, setting="--db", create=False)
        kept = Counter(choice.pair.prompt for choice in store.choices())
        store.close()
    lost, doubled = total - sum(kept.values()), sum(count - 1 for count in kept.values())
    p95 = statistics.quantiles(times, n=20)[-1]
    print(f"{total} choices of {given.annotators} annotators in {wall:.1f} s, {total / wall:.0f} a second")
    print(f"lost {lost}, doubled {doubled}")
    print(
        f"median {1000 * statistics.median(times):.1f} ms, p95 {1000 * p95:.1f} ms, longest {1000 * times[-1]:.1f} ms"
    )
    return int(lost != 0 or doubled != 0 or p95 > given.limit)


if __name__ == "__main__":
    sys.exit(main())
