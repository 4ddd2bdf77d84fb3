"""Quality on real data under the published protocols: Online Retail (with repeats, new items only) and Gowalla.

Online Retail: the preset's cleaning; purchases before the cut are known, those from it on are relevant; 1,790 test users at
2011-10-10. Every source is measured alone and in the pipeline that is served. ``--window valid`` measures the same two months
earlier (cut 2011-08-10), where settings may be chosen; the committed rows are of ``--window test``, where none were.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import harness
import quality_gowalla

from maple.artifacts import Place
from maple.data.dataset import Dataset
from maple.data.ingest import ingest_local
from maple.data.presets import load_source
from maple.data.splits import Boundaries, moment
from maple.evaluate.harness import CatalogueStats, Evaluation, evaluate, relevant_of
from maple.models.base import FitContext
from maple.recommend.settings import default_settings
from maple.run import merged
from maple.train.fit import fit_pipeline, lists_of_pipeline, lists_of_source

COMMAND = "make bench NAME=quality"
#: Window -> (T1, T2, end): sources learn before T1, the ranker from [T1, T2), users are tested on [T2, end).
WINDOWS = {
    "test": ("2011-08-10", "2011-10-10", None),
    "valid": ("2011-06-10", "2011-08-10", "2011-10-10"),
}
#: What the measured figures stand beside: anchors of simple models under the same protocol.
ANCHORS = {
    ("repeats", "popularity"): 0.125, ("repeats", "item-knn"): 0.192, ("repeats", "ease"): 0.272, ("repeats", "als"): 0.272,
    ("repeats", "frequency"): 0.350, ("repeats", "pipeline"): 0.350,
    ("new", "popularity"): 0.081, ("new", "item-knn"): 0.082, ("new", "als"): 0.101, ("new", "ease"): 0.109, ("new", "pipeline"): 0.109,
}  # fmt: skip
NAMES = {"popular": "popularity"}


def online_retail() -> Dataset:
    """The preset's snapshot in memory."""
    source, root = load_source("online-retail", harness.data_folder() / "online-retail")
    with TemporaryDirectory() as home:
        return ingest_local(source, root, Place.at(home)).dataset()


def measure(data: Dataset, repeats: bool, window: str, tuned: dict[str, dict[str, Any]] | None = None) -> dict[str, Evaluation]:
    """Pipeline and sources by name, on the test users of a window."""
    start, cut, end = WINDOWS[window]
    t1, t2 = moment(start), moment(cut)
    stop = data.span[1] + 1 if end is None else moment(end)
    settings = merged(default_settings(repeats=repeats), tuned or {})
    began = time.perf_counter()
    fitted = fit_pipeline(data.before(stop), settings, Boundaries(t1, t2), fingerprint="benchmark", ctx=FitContext(seed=1), say=_quiet)
    print(f"  fitted in {time.perf_counter() - began:.0f} s: {fitted.rows.describe() if fitted.rows else ''}", flush=True)
    relevant = relevant_of(data, t2, stop, new_only=not repeats, known_before=t2)
    stats = CatalogueStats.of(data, t2, vectors=fitted.bundle.parts.vectors)
    askers = {"pipeline": lists_of_pipeline(fitted.bundle, data, relevant, t2, 20)}
    for name, model in fitted.bundle.parts.sources.items():
        askers[NAMES.get(name, name)] = lists_of_source(model, fitted.bundle, data, relevant, t2, 20)
    return {name: evaluate(asker, relevant, catalogue=stats, ks=(10, 20), segments={}) for name, asker in askers.items()}


def rows_of(found: dict[str, Evaluation], mode: str) -> list[dict[str, Any]]:
    """The rows of one mode, each beside its anchor."""
    rows = []
    for name, result in found.items():
        for metric in ("ndcg@20", "recall@20", "hit@20", "ndcg@10", "coverage@20"):
            anchor = ANCHORS.get((mode, name)) if metric == "ndcg@20" else None
            what = "anchor: best single source" if name == "pipeline" else "anchor"
            rows.append(
                harness.row(
                    f"online-retail/{mode}/{name}/{metric}", result.means[metric], metric, what if anchor else "none", anchor, COMMAND
                )
            )
    popular = found["popularity"].means["ndcg@10"]
    lift = found["pipeline"].means["ndcg@10"] / popular
    rows.append(harness.row(f"online-retail/{mode}/pipeline-over-popularity/ndcg@10", lift, "ratio", "popularity", popular, COMMAND))
    return rows


def _quiet(text: str) -> None:
    """Progress is not wanted here."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["online-retail", "gowalla"], help="one data set")
    parser.add_argument("--window", choices=list(WINDOWS), default="test", help="valid: two months earlier, nothing is written")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    if args.only != "gowalla":
        data = online_retail()
        for mode in ("repeats", "new"):
            print(f"Online Retail, {mode}", flush=True)
            rows += rows_of(measure(data, mode == "repeats", args.window), mode)
    if args.only != "online-retail" and args.window == "test":
        print("Gowalla", flush=True)
        rows += quality_gowalla.rows()
    harness.show(rows)
    if args.window == "test":
        print(f"written to {harness.upsert('quality', rows).relative_to(Path.cwd())}")


if __name__ == "__main__":
    main()
