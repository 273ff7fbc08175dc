"""The explorer: all that a page shows, as one HTML file or in a notebook, without a server or a network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image

from avlprof.analysis.lens import Lens
from avlprof.errors import UserError, cut
from avlprof.explore.data import MASSES, Record, says, side
from avlprof.explore.packing import picture_uri
from avlprof.files import write_text
from avlprof.runs import RunMeta
from avlprof.tasks.text import printable
from avlprof.versions import __version__

SAMPLES = 16
"""Samples of a page where nobody says how many."""
HEADS_BYTES = 12 << 20
"""Text that the maps of single heads may take in a page; samples behind that have means alone."""
FRAME_HEIGHT = 900
"""Pixels of the frame in a notebook."""
FORMAT = "avlprof.explore/1"

Pictures = Callable[[str], Sequence[Image.Image]]


@dataclass(frozen=True)
class Side:
    """One of the runs that a page shows side by side: `records` of its samples by id.

    `states` are what a policy kept, by sample, as `States.packed` gives them; a run alone has none. `lens`
    is what vision tokens say, if that was read.
    """

    label: str
    meta: RunMeta
    records: Mapping[str, Record]
    states: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    policy: str = ""
    lens: Lens | None = None


@dataclass(frozen=True)
class Explorer:
    """A page about traced samples: `save` writes it, a notebook shows it by itself.

    `data` is what the page shows, as JSON takes it; all of it is in the page.
    """

    title: str
    data: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls, sides: Sequence[Side], ids: Sequence[str], pictures: Pictures, heads_bytes: int = HEADS_BYTES
    ) -> Explorer:
        """The page of samples `ids` of one or two sides, the first of which has all of them.

        Args:
            pictures: the pictures of a sample, in the order of its tiles; where it raises a `UserError`
                the page says why there are none.
            heads_bytes: bounds the maps of single heads, which a run with `per_head` has; the first sample
                has them in any case, and none does behind one whose maps go beyond.

        Raises:
            UserError: there is no sample, or one's scores do not fit the run.
        """
        if not ids:
            raise UserError("an explorer needs a sample; give the id of one that was traced, or trace some")
        meta, left = sides[0].meta, heads_bytes
        samples: list[dict[str, Any]] = []
        for sample in ids:
            shown = _sample(sides, sample, pictures, left > 0)
            taken = sum(len(own["heads"]["levels"]) for own in shown["sides"] if own and own["heads"])
            if taken > left and samples:  # the first sample has its heads in any case
                shown["sides"] = [own and {**own, "heads": None} for own in shown["sides"]]
            left = max(left - taken, 0)
            samples.append(shown)
        data = {
            "format": FORMAT,
            "masses": [name.removeprefix("mass_") for name in MASSES],
            "sides": [_side_facts(own) for own in sides],
            "samples": samples,
        }
        return cls(printable(f"{meta.model} on {meta.task}"), data)

    def html(self) -> str:
        """The whole page as text."""
        folder = files("avlprof.explore")
        script, style, page = (
            (folder / name).read_text(encoding="utf-8")
            for name in ("explore.js", "explore.css", "explore.html")
        )
        parts = {
            "{{title}}": html.escape(self.title),
            "{{version}}": html.escape(__version__),
            "{{script-hash}}": _hash(script),
            "{{style-hash}}": _hash(style),
            "{{style}}": style,
            "{{data}}": as_json(self.data),
            "{{script}}": script,
        }
        whole, rest = [], page
        while rest:  # from left to right, so that nothing which data holds is taken for a part
            name = min((name for name in parts if name in rest), key=rest.index, default="")
            before, _, rest = rest.partition(name) if name else (rest, "", "")
            whole += [before, parts[name]] if name else [before]
        return "".join(whole)

    def save(self, path: Path | str) -> Path:
        """Write the page; the file appears whole or not at all. `UserError` when it cannot be written."""
        path = Path(path)
        write_text(path, self.html())
        return path

    def _repr_html_(self) -> str:
        """A frame that may run the page's own script and reach nothing of the notebook."""
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" sandbox="allow-scripts" title="avlprof explore" '
            f'style="width:100%;height:{FRAME_HEIGHT}px;border:0"></iframe>'
        )


def as_json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element: no character that HTML reads, and ASCII alone."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _hash(text: str) -> str:
    """What a content security policy names a script or style by."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _side_facts(own: Side) -> dict[str, Any]:
    meta = own.meta
    return {
        "label": printable(own.label),
        "model": printable(meta.model),
        "task": printable(meta.task),
        "policy": printable(own.policy or meta.policy_label),
        "layers": meta.layers,
        "heads": meta.heads,
        "perHead": meta.per_head,
        "textRows": meta.text_rows,
    }


def _sample(sides: Sequence[Side], sample: str, pictures: Pictures, heads: bool) -> dict[str, Any]:
    """What the page has of one sample; a side that lacks it is None."""
    shown, note = [], ""
    try:
        shown = [
            {"uri": picture_uri(picture), "width": picture.width, "height": picture.height}
            for picture in pictures(sample)
        ]
    except UserError as error:
        sees = int(sides[0].records[sample].row["vision"]) > 0
        note = f"The pictures are missing: {cut(str(error), 300)}." if sees else ""
    own = []
    for each in sides:
        record = each.records.get(sample)
        one = None if record is None else side(record, each.meta, heads)
        if record is not None and one is not None:
            said = None if each.lens is None else says(each.lens, sample, record)
            one = {**one, "states": each.states.get(sample), "says": said}
        own.append(one)
    row = sides[0].records[sample].row
    return {
        "id": printable(sample),
        "group": printable(str(row["group"])),
        "prompt": printable(str(row["prompt"])),
        "references": [printable(str(text)) for text in row["references"]],
        "pictures": shown,
        "note": printable(note),
        "sides": own,
    }
