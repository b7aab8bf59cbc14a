"""The public names and their parameters, compared with Ray's: ``ray_2_60.json``, made by ``surface.py``.

Each difference has its reason in ``docs/differences.py``; a reason whose difference is gone is an error too, so that the list stays
true. ``docs/api.md`` and ``docs/ray.md`` are what ``docs/pages.py`` makes of all this.
"""

from __future__ import annotations

import fnmatch
import json
import sys
from pathlib import Path

import pytest

hpc_ray = pytest.importorskip("hpc_ray")
if not hasattr(hpc_ray, "init"):
    pytest.skip("needs the built package", allow_module_level=True)

DOCS = Path(__file__).parent.parent.parent / "docs"
sys.path.insert(0, str(DOCS))
import pages  # noqa: E402
from differences import BETTER, REASONS, TABLE, differences  # noqa: E402

sys.path.remove(str(DOCS))

DIFFERENCES = differences()


def test_every_difference_has_a_reason():
    unexplained = [one for one in DIFFERENCES if not any(fnmatch.fnmatchcase(one, pattern) for pattern in REASONS)]
    assert not unexplained, "\n".join(unexplained)


def test_every_reason_has_a_difference():
    idle = [pattern for pattern in REASONS if not fnmatch.filter(DIFFERENCES, pattern)]
    assert not idle, "\n".join(idle)


def test_the_table_is_there():
    """An empty one would agree with everything."""
    theirs = json.loads(TABLE.read_text())
    assert len(theirs) >= 30 and len(theirs[""]) > 40 and "class" in theirs["actor"]["ActorHandle"]


def test_what_is_better_is_there():
    names = [f"{module}:{name}" for module, names in json.loads(TABLE.read_text()).items() for name in names]
    assert not [pattern for pattern in BETTER if not fnmatch.filter(names, pattern)]


@pytest.mark.parametrize("page", sorted(pages.PAGES))
def test_the_pages_are_up_to_date(page):
    """If not: `make docs`."""
    assert (DOCS / page).read_text() == pages.PAGES[page]()
