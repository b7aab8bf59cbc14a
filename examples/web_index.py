"""An index of many pages, each read by a task.

From "Distributed Machine Learning with Ray" (the page "Tasks"), where `index` gets a page from the internet. What to look at:
`ray.wait` hands over the pages in the order in which they become ready, so the driver adds each to the index while
others are still being read.

    python examples/web_index.py                                  # the sources of Python's own library, as file:// addresses
    python examples/web_index.py https://docs.python.org/3/ ...   # pages of your choice
"""

import re
import sys
import sysconfig
from pathlib import Path
from urllib.request import urlopen

import hpc_ray as ray


@ray.remote(num_cpus=0.5)
def index(url):
    """How often each word is in a page; the error as a text, if there is no such page."""
    try:
        with urlopen(url, timeout=30) as page:
            text = page.read().decode("utf-8", "replace")
    except OSError as error:
        return str(error)
    counts = {}
    for word in re.findall(r"[a-z]{3,}", text.lower()):
        counts[word] = counts.get(word, 0) + 1
    return counts


def standard_library():
    """Addresses that every node can read."""
    return sorted(path.as_uri() for path in Path(sysconfig.get_path("stdlib")).glob("*.py"))


def main():
    internet = sys.argv[1:] or standard_library()
    futures = {index.remote(site): site for site in internet}
    words, failed = {}, []
    waiting = list(futures)
    while waiting:
        [ready], waiting = ray.wait(waiting, num_returns=1)
        counts = ray.get(ready)
        if isinstance(counts, str):
            failed.append(f"{futures[ready]}: {counts}")
            continue
        for word, count in counts.items():
            words.setdefault(word, []).append((-count, futures[ready]))

    print(f"{len(internet) - len(failed)} pages, {len(words):,} words")
    print(*sorted(failed), sep="\n", end="\n" * bool(failed))
    for word in "queue", "socket", "temporary":
        best = [f"{Path(site).name} ({-count})" for count, site in sorted(words.get(word, []))[:3]]
        print(f"{word:>10}: {', '.join(best) or 'nowhere'}")


if __name__ == "__main__":
    ray.init()
    main()
