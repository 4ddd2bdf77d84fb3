"""What the README says is so: its paths exist, its commands parse, its pages are accepted, its examples name real things."""

from __future__ import annotations

import contextlib
import re
import shlex
from pathlib import Path

import click
import pytest

from maple import cli
from maple.data import presets
from maple.data.presets import load_source
from maple.data.simulate import simulate
from maple.data.sources import SourceConfig
from maple.run import RunConfig, run_config
from maple.schema import ITEMS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PROSE = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
CODE = re.findall(r"`([^`\n]+)`", PROSE)


def of_kind(kind: str) -> list[str]:
    return [text for found, text in BLOCKS if found == kind]


def shell_lines() -> list[str]:
    """Commands of the bash blocks, joined over backslashes, without comments."""
    lines = [re.sub(r"(^|\s)#.*", "", line).strip() for text in of_kind("bash") for line in text.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line]


# -- paths -------------------------------------------------------------------------------------------------------------


def tree() -> list[str]:
    (text,) = (text for kind, text in BLOCKS if not kind and text.startswith("maple/\n"))
    out, folder = [], ""
    for line in text.splitlines():
        names = re.split(r"\s{3,}", line.strip())[0].split()
        inside = line.startswith("  ")
        folder = folder if inside else names[0] if names[0].endswith("/") else ""
        out += [f"{folder}{name}" if inside else name for name in names]
    return out


def test_the_tree_is_there_and_whole() -> None:
    told = tree()
    assert len(told) > 25
    for path in told:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    there = {
        f"maple/{path.name}" + "/" * path.is_dir() for path in (ROOT / "maple").iterdir() if path.name not in ("__pycache__", "py.typed")
    }
    assert there - {"maple/__init__.py"} == {path for path in told if path.startswith("maple/") and path != "maple/"}


def test_named_paths_exist() -> None:
    known = [text for text in CODE if re.fullmatch(r"(maple|tests|jobs|serve_configs|benchmarks|\.ci)/[\w./-]*", text)]
    assert len(known) > 8
    for text in known:
        assert (ROOT / text).exists(), text
    for text in [text for text in CODE if re.fullmatch(r"\w+\.py", text)]:
        assert list((ROOT / "maple").rglob(text)), text


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", PROSE):
        if target.startswith("#"):
            assert target[1:] in [
                re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", PROSE, re.M)
            ]
        elif not target.startswith("https://"):
            assert (ROOT / target).exists(), target


# -- commands ----------------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> dict[str, object]:
    """The parameters of a maple command line; a ``UsageError`` where it is none."""
    command: click.Command = cli.cli
    path = ["maple"]
    while isinstance(command, click.Group):
        name = words[0]
        if name not in command.commands:
            raise click.UsageError(f"no command {' '.join([*path, name])}")
        command, words, path = command.commands[name], words[1:], [*path, name]
    # A command keeps the help option of its first context: give it the parent that it has on the command line.
    with click.Context(cli.cli, **cli.CONTEXT) as parent:
        return command.make_context(" ".join(path), list(words), parent=parent).params


def test_the_commands_of_the_tour_parse() -> None:
    lines = [shlex.split(line)[1:] for line in shell_lines() if line.startswith("maple ")]
    assert len(lines) >= 9
    for words in lines:
        overrides = parse(words).get("overrides")
        run_config(None, None, overrides or ())  # type: ignore[arg-type]
    with pytest.raises(click.UsageError):
        parse(["trian"])


def test_the_tour_has_the_steps_in_order() -> None:
    from maple.steps import STEPS

    first = [shlex.split(line)[1] for line in shell_lines() if line.startswith("maple ")]
    assert [name for name in first if name in STEPS][: len(STEPS)] == list(STEPS)
    (steps,) = re.findall(r"for step in ([\w ]+);", README)
    assert steps.split() == list(STEPS)
    for name in STEPS:
        assert (ROOT / "jobs" / f"{name}.py").is_file()
        assert isinstance(run_config(str(ROOT / "jobs" / "configs" / f"{name}.yaml")), RunConfig)


def test_commands_in_the_text_exist() -> None:
    named = [text for text in CODE if text.startswith("maple ") and "<" not in text]
    named += re.findall(r"^ +(maple [\w ]*?)(?: {3}|$)", BLOCKS[0][1], re.MULTILINE)
    named += re.findall(r"# .*?(maple \w+ --config run\.yaml)", README)
    assert len(named) > 8
    for text in named:
        # A command named in passing lacks its arguments; its name and options must exist.
        with contextlib.suppress(click.MissingParameter):
            parse(text.removeprefix("maple ").split())


def test_make_targets_and_their_variables_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    named = [line for line in (*shell_lines(), *CODE) if line.startswith("make ")]
    assert len(named) > 5
    for line in named:
        _, target, *settings = line.split()
        assert target in targets, line
        for setting in settings:
            name, _, value = setting.partition("=")
            assert f"$({name})" in makefile, line
            if name == "NAME":
                assert (ROOT / "benchmarks" / f"{value}.py").is_file(), line


def test_environment_variables_are_read_somewhere() -> None:
    named = set(re.findall(r"\bMAPLE_[A-Z]+\b", README))
    assert {"MAPLE_HOME", "MAPLE_DATA", "MAPLE_REQUIRE"} <= named
    sources = "".join(path.read_text() for folder in ("maple", "tests") for path in (ROOT / folder).rglob("*.py") if path != Path(__file__))
    for name in named:
        assert f'"{name}"' in sources, name


# -- pages -------------------------------------------------------------------------------------------------------------


def test_the_pages_are_accepted(tmp_path: Path) -> None:
    run, source = of_kind("yaml")
    (tmp_path / "run.yaml").write_text(run)
    config = run_config(str(tmp_path / "run.yaml"))
    assert config.pipeline is not None
    rerank = config.pipeline.rerank
    assert rerank.mmr is not None
    assert rerank.freshness is not None
    columns = [*(cap.column for cap in rerank.caps), *(name for rule in rerank.rules for name in rule.match), rerank.freshness.column]
    assert len(columns) == 3
    assert set(columns) <= set(ITEMS.names)
    (tmp_path / "source.yaml").write_text(source)
    given, root = load_source(str(tmp_path))
    assert isinstance(given, SourceConfig)
    assert (given.name, root.local) == ("my-shop", tmp_path)
    assert given.items is not None


def test_the_preset_table_is_that_of_the_presets() -> None:
    rows = {cells[0].strip(" `"): cells for cells in (line.split("|")[1:] for line in README.splitlines()) if cells and "`" in cells[0]}
    assert set(presets.names()) <= set(rows)
    for name in presets.names():
        source, _ = load_source(name, "/")
        for _, table in source.tables:
            for path in table.paths:
                named, ending = rows[name][3], Path(path).suffix
                assert Path(path).stem in named or path in named, path
                assert ending in named, path


def test_examples_name_users_and_items_of_the_simulated_shop() -> None:
    truth = simulate(num_users=20, num_items=20, days=3).truth
    users, items = re.findall(r"\bu\d+\b", README), re.findall(r"\bsku[-\d]+\b", README)
    assert users
    assert items
    assert set(users) <= set(truth.user_ids)
    assert set(items) <= set(truth.item_ids)
