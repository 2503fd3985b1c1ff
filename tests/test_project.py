"""Files beside the code agree with it: container, hooks, forms, citation."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, each instruction and what follows it."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


def recipe(target: str) -> list[str]:
    """The commands of a make target, with the environment's folder written out."""
    rule = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)
    assert rule is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in rule[1].splitlines()]


def test_the_docker_image_copies_only_files_that_exist_and_are_allowed() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    }
    sources = [
        source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]
    ]
    assert sorted(sources) == sorted(allowed)
    assert all((ROOT / source).exists() for source in sources)
    # What building the package reads lies among them.
    assert {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml"} <= set(sources)


def test_the_image_installs_by_the_constraints_as_the_makefile_does() -> None:
    installs = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    first, second = (shlex.split(line) for line in installs)
    assert first == ["pip", "install", "torch", "-c", "constraints.txt", "$TORCH_ARGS"]
    assert "$(PIP) install torch -c constraints.txt $(TORCH_ARGS)" in MAKEFILE
    (extras,) = re.findall(r"^\.\[(.*)\]$", second[2])
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert second[3:] == ["-c", "constraints.txt"]
    copied = [index for index, (word, rest) in enumerate(instructions()) if "constraints" in rest]
    assert instructions()[copied[0]][0] == "COPY", "the constraints come before they are used"


def test_the_images_python_is_that_of_the_constraints() -> None:
    ((_, base),) = [found for found in instructions() if found[0] == "FROM"]
    version = re.fullmatch(r"python:(\d+)\.(\d+)-slim", base)
    assert version is not None
    told = re.search(r"\(Python (\d+)\.(\d+), Linux\)", (ROOT / "constraints.txt").read_text())
    assert told is not None and told.groups() == version.groups()
    least = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
    assert least is not None and [*map(int, version.groups())] >= [*map(int, least.groups())]


def test_the_image_runs_the_command_from_where_volumes_are_mounted() -> None:
    told = dict(instructions())
    assert told["ENTRYPOINT"] == '["segkit"]' and told["WORKDIR"] == "/data"
    assert "segkit" in PROJECT["scripts"]


def test_the_constraints_pin_what_the_extras_ask_for() -> None:
    pinned = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    extras = PROJECT["optional-dependencies"]
    named = ("demo", "report", "onnx", "openvino", "docs", "dev")
    asked = [*PROJECT["dependencies"], *(one for extra in named for one in extras[extra])]
    for requirement in asked:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name is not None
        key = re.sub(r"[-_.]+", "-", name[0]).lower()
        assert key in pinned | {"segkit"}, requirement


def test_the_hooks_are_the_checks_of_make() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local", "nothing is fetched"
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in repository["hooks"]]
    assert entries == [command.removesuffix(" .") for command in recipe("check")]
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_the_workflow_runs_the_checks_of_make_and_says_that_it_was_never_tried() -> None:
    text = (ROOT / ".github/workflows/tests.yml").read_text()
    assert text.startswith("# NEVER TRIED.")
    assert "has never been tried" in " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    job = yaml.safe_load(text)["jobs"]["test"]
    assert PROJECT["requires-python"] == f">={job['strategy']['matrix']['python'][0]}"
    run = "\n".join(step.get("run", "") for step in job["steps"])
    for command in (*recipe("check"), recipe("test")[0].partition("pytest")[2].partition("-n")[0]):
        assert command.removeprefix(".venv/bin/").strip() in run, command


@pytest.mark.parametrize("name", ["bug", "wish"])
def test_a_form_asks_questions_that_github_understands(name: str) -> None:
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert set(form) == {"name", "description", "body"}
    questions = [part for part in form["body"] if part["type"] != "markdown"]
    assert {part["type"] for part in questions} == {"textarea"}
    assert len({part["id"] for part in questions}) == len(questions)
    labels = {part["id"]: part["attributes"]["label"] for part in questions}
    assert all(label.endswith("?") or name == "versions" for name, label in labels.items())
    assert any(part.get("validations", {}).get("required") for part in questions)


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert [author["name"] for author in citation["authors"]] == [
        author["name"] for author in PROJECT["authors"]
    ]
    assert citation["message"] and PROJECT["description"].lower() in citation["title"].lower()


def test_make_builds_the_documentation_strictly() -> None:
    assert recipe("docs") == ["NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict"]


def test_the_readme_has_a_sentence_a_picture_and_ten_lines_of_python() -> None:
    text = (ROOT / "README.md").read_text()
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", text)
    assert (ROOT / picture).read_bytes().startswith(b"\x89PNG")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(block.splitlines()) <= 10
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", text)
    assert links and all(Path(ROOT / link).exists() for link in links)


ROOTED = re.compile(r"`((?:segkit|tests|docs|benchmarks|configs|notebooks)/[\w./-]+)`")
"""A path of a file or folder, as pages write it."""
PLACED = re.compile(r"`(segkit/[\w/]+\.py)`: `(?:\w+\.)?(\w+)`")
"""A file and a name in it, as docs/tour.md writes them."""


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/tour.md"])
def test_every_file_and_link_that_a_page_about_the_code_names_exists(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    paths = ROOTED.findall(text)
    assert len(paths) > 20
    assert not [path for path in paths if not (ROOT / path).exists()]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    links = re.findall(r"\]\(((?!https?:)[^)#]+)\)", prose)
    assert all(((ROOT / page).parent / link).exists() for link in links)


def test_each_row_of_the_tour_names_a_function_or_class_of_its_file() -> None:
    rows = PLACED.findall((ROOT / "docs/tour.md").read_text(encoding="utf-8"))
    assert len(rows) > 40
    for path, name in rows:
        assert re.search(rf"^ *(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (
            path,
            name,
        )


def test_the_map_of_rooms_is_that_of_the_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers: list[str] = contracts["contracts"][0]["layers"]
    expected = [
        {room.strip().removeprefix("segkit.") for room in layer.split("|")} for layer in layers
    ]
    rows = re.findall(
        r"^\| (\d+) \| `(\w+)(?:\.py)?` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    found = [{room for floor, room in rows if int(floor) == number} for number in range(1, 11)]
    assert found == expected
