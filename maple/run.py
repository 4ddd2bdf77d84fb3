"""The settings of a run, one typed YAML page that every step reads, and what a step gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from maple.config import Section, read_yaml, yaml_value
from maple.data.folds import SplitSettings
from maple.data.ingest import ROWS_PER_BUCKET
from maple.data.kcore import KCore
from maple.data.splits import TimeSplit
from maple.errors import ConfigError
from maple.features.spec import ContentRef, FeatureSpec
from maple.models.content.items import ContentSettings
from maple.recommend.settings import PipelineSettings, default_settings
from maple.serve.settings import StoreSettings
from maple.train.objectives import gives
from maple.train.rows import RowSettings

SIMULATED = "simulated"


Tables = tuple[tuple[str, list[str], list[list[str]]], ...]


@dataclass(frozen=True, eq=False)
class StepResult:
    """What a step did: one line, further lines, tables (title, header, rows), and JSON-ready facts for other programs."""

    summary: str
    details: tuple[str, ...] = ()
    tables: Tables = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class IngestSettings(Section):
    """How data becomes a snapshot."""

    rows_per_bucket: Annotated[int, Field(ge=1000)] = ROWS_PER_BUCKET  # bounds the memory of one task
    append: bool = False  # add what new files have to the latest snapshot, instead of reading everything
    compact: Literal["background", "now", "never"] = "background"  # after an append that left too many layers, or too large ones


class TuneSettings(Section):
    """How long to search, and for what."""

    models: tuple[str, ...] = ("als", "ranker")  # source names of the pipeline, and "ranker"
    random_trials: Annotated[int, Field(ge=0)] = 20
    tpe_trials: Annotated[int, Field(ge=0)] = 10
    max_concurrent: Annotated[int, Field(ge=1)] = 2
    epochs: Annotated[int, Field(ge=1)] = 8  # of the ranker in one trial
    resume: bool = True


class EvaluateSettings(Section):
    """What is measured."""

    ks: tuple[int, ...] = (5, 10, 20)
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    max_users: Annotated[int, Field(ge=1)] = 5000  # test users, drawn if there are more
    sources: bool = True  # also each source alone
    baseline: str = "popular"


class PublishSettings(Section):
    """What happens to a finished bundle."""

    promote: bool = True


class ServingSettings(Section):
    """How the champion is served."""

    placement: Literal["fused", "split"] = "fused"
    shape: str | None = None  # a YAML of serve_configs/; default: that of the placement
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0 = a free one
    store: StoreSettings = StoreSettings()
    backfill: bool = True  # load the snapshot's events into the online store first
    clock: Literal["now", "data"] = "now"  # "data": the service lives at the end of its data, for historical sets


class RunConfig(Section):
    """Everything about one run that people set. Each step reads its own part."""

    data: str = SIMULATED  # a preset, a folder, a source YAML, or "simulated"
    seed: int = 0
    threads: Annotated[int, Field(ge=1)] = 1  # of one model fit
    ingest: IngestSettings = IngestSettings()
    k_core: KCore = KCore()  # of what is learned from and measured; features know all events
    split: SplitSettings = TimeSplit()  # training wants one by time; `maple evaluate` measures the sources under any other
    content: dict[str, ContentSettings] = Field(default_factory=lambda: {"text": ContentSettings()})  # item vectors; {} = none
    features: FeatureSpec = FeatureSpec()  # views, half-lives, attributes, context; the history limit is the pipeline's
    pipeline: PipelineSettings | None = None  # default: all six sources and DCN-v2; repeats where purchases are the targets
    rows: RowSettings = RowSettings()
    tune: TuneSettings = TuneSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    publish: PublishSettings = PublishSettings()
    serve: ServingSettings = ServingSettings()

    def pipeline_for(self, targets: Sequence[str]) -> PipelineSettings:
        """The pipeline settings, by default chosen from what counts as relevant: bought things may be bought again, rated ones not."""
        if self.pipeline is not None:
            return self.pipeline
        repeats = "purchase" in targets
        return default_settings(repeats=repeats).with_(bought=list(targets))

    def features_for(self, targets: Sequence[str], content: Mapping[str, ContentRef]) -> FeatureSpec:
        """The feature spec: what a user is remembered by is the pipeline's to say, and vectors are what ``content`` made."""
        limit = self.pipeline_for(targets).history_limit
        if self.features.history_limit not in (limit, FeatureSpec().history_limit):
            raise ConfigError(
                f"features.history_limit is {self.features.history_limit} and that of the pipeline {limit}; a user must be the same events "
                "for models and features, so write it in the pipeline alone"
            )
        if self.features.content:
            raise ConfigError("features.content is made by the feature build; say under `content:` what is encoded")
        return self.features.with_(history_limit=limit, content={name: ref.plain() for name, ref in content.items()})


def run_config(path: str | None, data: str | None = None, overrides: Sequence[str] = ()) -> RunConfig:
    """Settings from a YAML page, a data name, and ``key.path=value`` overrides (values are YAML); the last one wins."""
    page = read_yaml(path) if path else {}
    if data is not None:
        page["data"] = data
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals or not name:
            raise ConfigError(f"--set {override!r}: write key=value, for example --set tune.random_trials=8")
        try:
            _put(page, name.split("."), yaml_value(value))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not YAML: {' '.join(str(error).split())}") from None
    return RunConfig.parse(page, path or "settings")


def _put(page: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    here = page
    for key in keys[:-1]:
        below = here.setdefault(key, {})
        if not isinstance(below, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {key!r} is not a section")
        here = below
    here[keys[-1]] = value


def merged(settings: PipelineSettings, tuned: Mapping[str, Mapping[str, Any]]) -> PipelineSettings:
    """Pipeline settings with tuned values in the configs they belong to; a dotted name reaches into a section.

    What people wrote stays: a tuned value only fills a setting that the page does not give.
    """
    page = settings.plain()
    targets = {source["name"]: source for source in page["sources"]} | ({"ranker": page["ranker"]} if page["ranker"] else {})
    for name, values in tuned.items():
        if name in targets:
            for key, value in values.items():
                if not gives(targets[name]["config"], key):
                    _put(targets[name]["config"], key.split("."), value)
    return PipelineSettings.parse(page, "tuned pipeline settings")
