"""The README's pictures of the rows: each is `data`, what exactly it shows, and `draw`, how.

A PNG carries the fingerprint of what it was drawn from, so that a test can tell whether it is stale, and so that it is
not written anew because another matplotlib draws it with other bytes. What was not measured says so in its place.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from benchmarks import draw, floor
from benchmarks.rows import compared, groups, latest, reason, rung
from gpt2fast.model import SIZES

KEY = "Description"  # of a PNG's text, where the fingerprint is

# One step of gpt2 in bf16, counted at an H200's ceilings
FLOOR_SHAPE, FLOOR_GPU = {"size": "gpt2", "B": 64, "T": 1024}, "H200"
FLOOR = {
    kind: round(ms, 1) for kind, ms in floor.kinds(floor.parts(SIZES["gpt2"], B=64, T=1024), floor.Ceilings()).items()
}


@dataclass(frozen=True)
class Plot:
    data: Callable[[Path], Any]  # of the folder of results: lists and dictionaries
    draw: Callable[[Any], Figure]


def fingerprint(data: list | dict) -> str:
    """Of the data and of the code that draws it."""
    code = Path(draw.__file__).read_text()
    return hashlib.sha256((json.dumps(data, sort_keys=True) + code).encode()).hexdigest()


def fingerprint_in(path: Path) -> str | None:
    """None if there is no such picture, or one that does not say."""
    try:
        with Image.open(path) as image:
            return image.info.get(KEY)
    except OSError:
        return None


def png(plot: Plot, data: list | dict) -> bytes:
    """With a palette: a third of the bytes, and the eye sees no difference."""
    drawn, small, text = io.BytesIO(), io.BytesIO(), PngInfo()
    plot.draw(data).savefig(drawn, format="png")
    text.add_text(KEY, fingerprint(data))
    Image.open(drawn).convert("RGB").quantize(256).save(small, format="png", pnginfo=text, optimize=True)
    return small.getvalue()


def ladder_data(results: Path) -> dict:
    return _panels(results, "ladder", lambda rows: [_rung(row) for row in latest(rows, "rung")])


def _rung(row: dict) -> dict:
    ours = row["config"]["backend"] == "triton" or bool(row["config"].get("swapped"))
    bar = {"name": rung(row), "ours": ours, "why": None if row["status"] == "ok" else reason(row, 70)}
    if bar["why"]:
        return bar
    speed = row["tokens_per_s"]
    return bar | {"tokens_per_s": speed["median"], "low": speed["p20"], "high": speed["p80"]}


def peers_data(results: Path) -> dict:
    shown = ("name", "ours", "tokens_per_s", "low", "high", "times")

    def bar(each: dict) -> dict:
        why = each["why"] and (each["why"] if len(each["why"]) <= 70 else each["why"][:69] + "…")
        return {key: each.get(key) for key in shown} | {"why": why}

    return _panels(results, "peers", lambda rows: [bar(each) for each in compared(rows, "ms")])


def _panels(results: Path, suite: str, bars: Callable[[list[dict]], list[dict]]) -> dict:
    found = groups(results, suite)
    missing = [kind for kind in ("GPU", "CPU") if not any((group.gpu is None) == (kind == "CPU") for group in found)]
    return {"panels": [{"title": group.title, "bars": bars(group.rows)} for group in found], "missing": missing}


def roofline_data(results: Path) -> list:
    """For each GPU: its ceilings, and of each op what was moved (GB) or multiplied (TFLOP), and how fast."""
    folders: dict[str, dict] = {}
    for group in groups(results, "kernels"):
        if not group.gpu:
            continue
        gpu = folders.setdefault(group.folder, {"device": group.device, "ops": {}})
        gpu["ceilings"] = group.rows[-1]["ceilings"]
        for row in latest(group.rows, "provider", "direction"):
            if row["status"] == "ok":
                multiplies = "tflops" in row
                rate = row["tflops"] if multiplies else row["gb_per_s"] / 1e3  # TFLOP/s or TB/s
                op = gpu["ops"].setdefault(group.config["op"], {"multiplies": multiplies, "points": []})
                point = {"work": rate * row["ms"]["median"] * (1e-3 if multiplies else 1), "rate": rate}
                op["points"].append(point | {"provider": row["provider"], "direction": row["direction"]})
    return list(folders.values())


def step_data(results: Path) -> dict:
    """Milliseconds of one step by group of kernels, for each GPU and shape, beside the floor where it is known."""
    panels = []
    for group in groups(results, "profile"):
        if not group.gpu:
            continue
        steps = {row["backend"]: dict(row["groups"]) for row in group.rows}
        for row in group.rows:  # what the kernels leave of the step's time, measured without a profiler
            steps[row["backend"]]["device idle"] = max(0.0, row["wall_ms"] - row["device_ms"])
        ideal = FLOOR if group.config == FLOOR_SHAPE and FLOOR_GPU in group.gpu else None
        panels.append({"title": group.title, "floor": ideal, "steps": steps})
    title = "{size}, B={B}, T={T}, bf16".format(**FLOOR_SHAPE) + f" on NVIDIA {FLOOR_GPU}"
    return {"panels": panels or [{"title": title, "floor": FLOOR, "steps": {}}], "unmeasured": not panels}


PLOTS = {
    "ladder": Plot(ladder_data, draw.ladder),
    "peers": Plot(peers_data, draw.peers),
    "roofline": Plot(roofline_data, draw.roofline),
    "step": Plot(step_data, draw.step),
}
