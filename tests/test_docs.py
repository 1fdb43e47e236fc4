"""Code and commands on pages run, links lead to files, and the diagram of packages shows the imports of the code."""

import re
import shlex
from pathlib import Path

import grimp
import pytest

import hierens
from hierens import cli
from hierens.cli.command import UsageError

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
RUNNABLE = [page for page in PAGES if "```python\n" in page.read_text()]


def name_of(page):
    return str(page.relative_to(ROOT))


def commands(block):
    """The command lines of a block of bash, without comments, loops' keywords and what is piped on."""
    lines = block.replace("\\\n", " ").splitlines()
    for line in lines:
        if re.match(r"[A-Z]+=\$\(|\[ ", line):  # the shell's own
            continue
        line = re.sub(r"\$\w+", lambda name: {"$seed": "0", "$objective": "independent"}.get(name[0], name[0]), line)
        words = shlex.split(line.split(" | ")[0].split(" > ")[0], comments=True)
        while words and words[0] in ("do", "for", "done"):
            words = [] if words[0] == "for" else words[1:]
        if words:
            yield words


COMMANDS = [
    pytest.param(words, id=f"{name_of(page)}: {' '.join(words)[:60]}")
    for page in PAGES
    for block in re.findall(r"```bash[^\n]*\n(.*?)```", page.read_text(), re.DOTALL)
    for words in commands(block)
]


@pytest.mark.parametrize("page", [page for page in RUNNABLE if page.name != "tutorial.md"], ids=name_of)
def test_code_on_pages_runs(page, tmp_path, monkeypatch):
    """The tutorial is run, with its commands, by `test_tutorial.py`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").symlink_to(ROOT / "models")  # pages speak as from a checkout
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)


def test_there_are_pages_to_run():
    assert {"README.md", "tutorial.md", "hub.md", "gallery.md", "train.md"} <= {page.name for page in RUNNABLE}
    assert len(COMMANDS) > 50


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_on_pages_are_understood(words, tmp_path, monkeypatch):
    """Programs, targets, files and flags that a page names are there; what they do is tested elsewhere."""
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word != "..."]
    while words[0] == "srun" or re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] == "accelerate" and words[1] == "launch":
        start = next(i for i, word in enumerate(words) if word == "-m" or word.endswith(".py"))
        words = ["python", *words[start:]]
    if words[:2] == ["python", "-m"] and words[2] in ("hierens", "hierens.cli"):
        words = ["hierens", *words[3:]]
    program, *rest = words
    if program == "hierens":
        understood(rest)
    elif program in ("python", "torchrun"):
        file = next(word for word in rest if word.endswith(".py"))
        beside = (ROOT / "examples").glob("*/*.py") if file.startswith("examples/") else ()
        text = "".join(path.read_text() for path in (ROOT / file, *beside))
        if file.startswith("examples/train_"):
            understood(["train", *rest[rest.index(file) + 1 :]])
        else:
            for flag in (word for word in rest[rest.index(file) + 1 :] if word.startswith("--")):
                field = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
                assert re.search(rf'^    {field}: |"{flag}"', text, re.MULTILINE), f"{file} has no {flag}"
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert all(word in targets for word in rest if "=" not in word)
    elif program == "pip":
        extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
        named = re.search(r"\[(.*)\]", " ".join(rest))
        assert named is None or set(named.group(1).split(",")) <= extras
    else:
        assert program in KNOWN, f"{program} is nothing that a page of ours should need"


KNOWN = ("accelerate", "curl", "hf", "cp", "mkdir", ".venv/bin/pre-commit")


def understood(words):
    """What `hierens WORDS` means can be said: every flag exists and every value is of its kind."""
    name, *arguments = words
    command = cli.COMMANDS[name]
    arguments = [word for word in arguments if word != "--print-config"]
    for flag in ("--preset", "--config"):
        if flag in arguments:
            at = arguments.index(flag)
            if flag == "--preset":
                assert arguments[at + 1] in cli.training.PRESETS
            del arguments[at : at + 2]
    if {"--weights", "--teacher-weights"} & set(arguments):  # files that a reader has
        return command._check_names(arguments)
    try:
        return command.parse(arguments)
    except (UsageError, SystemExit) as error:
        pytest.fail(f"hierens {shlex.join(words)}: {error}")


def test_the_reference_lists_the_public_face():
    listed = re.findall(r"^\| \[`(\w+)`\]", (ROOT / "docs/reference/index.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(hierens.__all__)


def diagram_of_imports():
    """The packages of hierens and their imports, as Mermaid; without imports that others imply."""
    graph = grimp.build_graph("hierens", cache_dir=None)
    imports: dict[str, set[str]] = {}
    for module in graph.modules - {"hierens", "hierens.__main__"}:
        package = module.split(".")[1]
        names = (imported.split(".")[1] for imported in graph.find_modules_directly_imported_by(module))
        imports.setdefault(package, set()).update(name for name in names if name != package)

    def below(package):
        return imports[package].union(*map(below, imports[package]))

    kept = {package: own - set().union(*map(below, own)) for package, own in imports.items()}
    edges = (f"  {package} --> {name}" for package in sorted(kept) for name in sorted(kept[package]))
    return "\n".join(("```mermaid", "graph TD", *edges, "```"))


def test_the_diagram_of_packages_shows_their_imports():
    diagram, page = diagram_of_imports(), (ROOT / "docs/architecture.md").read_text()
    assert diagram in page, f"the diagram in docs/architecture.md should be:\n{diagram}"


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"
