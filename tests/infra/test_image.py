"""The Dockerfile, checked as text: these tests cannot build images."""

from __future__ import annotations

import fnmatch
import re
import tomllib
from functools import cache

from manifests import INFRA, KUBERNETES, ROOT, load_all

Instruction = tuple[str, str]


@cache
def stages() -> list[list[Instruction]]:
    """The Dockerfile's instructions, one list per FROM; those before the first FROM belong to the first list."""
    text = re.sub(r"^\s*#.*\n", "", (INFRA / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    found: list[list[Instruction]] = [[]]
    for line in lines:
        name, _, rest = line.partition(" ")
        if name == "FROM" and any(instruction == "FROM" for instruction, _ in found[-1]):
            found.append([])
        found[-1].append((name, rest))
    return found


def arguments(stage: list[Instruction], name: str) -> list[str]:
    return [rest for instruction, rest in stage if instruction == name]


def pinned() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text()
    return {name.lower().replace("_", "-"): version for name, version in re.findall(r"(?m)^([\w.-]+)==(.+)$", text)}


def ray_of_the_image() -> str:
    (version,) = (rest.removeprefix("RAY=") for rest in arguments(stages()[-1], "ARG") if rest.startswith("RAY="))
    return version


def test_instructions_are_dockers() -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "LABEL", "ENV", "USER", "CMD"}
    assert {name for stage in stages() for name, _ in stage} <= known
    assert len(stages()) == 2


def test_it_has_the_ray_of_the_constraints_and_of_every_manifest() -> None:
    assert ray_of_the_image() == pinned()["ray"]
    versions = {
        match for path in KUBERNETES.rglob("*.yaml") for match in re.findall(r"rayVersion: (\S+)", path.read_text())
    }
    assert versions == {pinned()["ray"]}


def test_it_runs_as_nobody_in_particular() -> None:
    """The user must be numeric, else Kubernetes cannot verify that it is not root."""
    *_, last = [(name, rest) for name, rest in stages()[-1] if name in ("USER", "RUN")]
    assert last == ("USER", "1000:1000")
    (template,) = load_all((KUBERNETES / "template" / "cluster.yaml").read_text())
    assert template["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] == 1000


def test_it_has_what_probes_call_where_a_login_shell_looks() -> None:
    runs = " ".join(arguments(stages()[-1], "RUN"))
    assert re.search(r"apt-get install .*\bwget\b", runs)
    assert "rm -rf /var/lib/apt/lists/*" in runs
    assert "--user" not in runs
    assert "venv" not in runs
    assert all("PATH" not in rest for rest in arguments(stages()[-1], "ENV"))


def locked(name: str) -> dict[str, str]:
    """The versions of a lock file. Checks that each line has the hash of one wheel."""
    found = {}
    for line in (INFRA / name).read_text().splitlines():
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert match, line
        found[match[1]] = match[2]
    return found


def test_locks_are_of_the_constraints_and_hold_all_that_is_required() -> None:
    versions = locked("requirements.lock")
    assert {name: pinned()[name] for name in versions if name in pinned()} == {
        name: version for name, version in versions.items() if name in pinned()
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["traces"], "boto3"]
    assert {re.match(r"[\w-]+", text)[0] for text in wanted} <= {*versions}  # type: ignore[index]
    assert {"hatchling", "uv"} <= {*locked("tools.lock")}
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^ENCODER := (.*)$", makefile, re.MULTILINE)[1].split("==") in [  # type: ignore[index]
        list(model) for model in locked("models.lock").items()
    ]


def test_every_installation_wants_hashes() -> None:
    runs = " ".join(rest for stage in stages() for rest in arguments(stage, "RUN"))
    installs = re.findall(r"pip install ([^&;]*)", runs)
    assert len(installs) == 4
    for install in installs:
        assert "--no-deps" in install
        assert "--require-hashes" in install or install.strip().endswith("--no-index --no-deps /wheels/*.whl")
    assert "--no-build-isolation" in runs  # else pip downloads build requirements
    setup = " ".join(load_all((INFRA / "cluster.yaml").read_text())[0]["setup_commands"])
    for install in re.findall(r"pip install (\S.*?)(?= ~/tools| echo|$)", setup):
        assert "--require-hashes --no-deps" in install or "--no-index --no-deps" in install


def test_bases_are_named_by_their_digests() -> None:
    assert ("ARG", "PYTHON_DIGEST") in stages()[0]  # no default, so that Docker refuses to build without it
    for stage in stages():
        (base,) = arguments(stage, "FROM")
        assert re.fullmatch(r"\S+@\$\{PYTHON_DIGEST\}( AS \w+)?", base)


def test_nothing_that_is_fetched_is_run_unseen() -> None:
    for path in (ROOT / "Makefile", *(path for path in INFRA.rglob("*") if path.is_file())):
        assert not re.search(r"(curl|wget)[^\n]*\|\s*(ba)?sh", path.read_text()), path


def test_what_is_copied_is_there_and_is_not_ignored() -> None:
    first, *rules = [
        rule for rule in (INFRA / "Dockerfile.dockerignore").read_text().splitlines() if not rule.startswith("#")
    ]
    assert first == "*"
    kept = {rule.removeprefix("!") for rule in rules if rule.startswith("!")}
    sources = {
        source
        for stage in stages()
        for copied in arguments(stage, "COPY")
        for source in copied.split()[:-1]
        if not source.startswith("--")
    }
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)


def test_all_that_the_wheel_is_made_of_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    copied = " ".join(arguments(stages()[0], "COPY")).split()
    for needed in ("pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]):
        assert needed in copied
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert any(fnmatch.fnmatch(package, f"{source}*") for source in copied)
