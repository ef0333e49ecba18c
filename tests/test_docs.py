"""The program of docs/pytorch.md runs as it stands and prints what the page says."""

import re

import pytest
import torch
from conftest import ROOT


@pytest.mark.skipif(not hasattr(torch.amp, "GradScaler"), reason="needs torch 2.3")
def test_pytorch_loop(capsys):
    page = (ROOT / "docs" / "pytorch.md").read_text()
    blocks = re.findall(r"```(python|text)\n(.*?)```", page, re.DOTALL)
    namespace = {}
    for kind, block in blocks:
        if kind == "python":
            exec(block, namespace)
        else:
            assert capsys.readouterr().out == block
    assert [kind for kind, _ in blocks].count("text") == 4
    assert capsys.readouterr().out == ""


def test_the_tests_that_trust_names_are_there():
    named = re.findall(
        r"`((?:\w+/)*test_\w+\.py)(?:::(\w+))?`", (ROOT / "docs/trust.md").read_text()
    )
    assert len(named) > 30
    for path, name in named:
        text = (ROOT / "tests" / path).read_text()
        assert not name or re.search(rf"^\s*(class|def) {name}\b", text, re.MULTILINE), name


def test_troubleshooting_quotes_what_the_code_says():
    sources = "".join(
        path.read_text() for path in (ROOT / "cbn_mmdet").rglob("*.py") if path.is_file()
    )
    said = re.sub(r'"\s*\n\s*f?"', "", sources)  # strings that go on in the next line
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        message
        for row in re.findall(r"^\| (`.*?) \| ", page, re.MULTILINE)
        for message in re.findall(r"`(.+?)`", row)
    ]
    assert len(quoted) > 15
    assert [message for message in quoted if message.lower() not in said.lower()] == []


def test_links_between_pages():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    headings = {
        page: {
            re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
            for title in re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
        }
        for page in pages
    }
    for page in pages:
        for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {path}"
            assert not anchor or anchor in headings[target], f"{page.name}: {path}#{anchor}"


def test_commands_are_the_projects():
    """Each tool and each of its options, each target of make, that a page or the README names."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.split("#")[0]
                assert set(re.findall(r"^make ([\w-]+)", line)) <= targets, line
                for tool, rest in re.findall(r"python (?:\S*/)?(tools/\w+\.py)(.*)", line):
                    text = (ROOT / tool).read_text() + (ROOT / "cbn_mmdet/launch.py").read_text()
                    for option in re.findall(r"(?<=\s)--[a-z0-9-]+", rest):
                        assert f'"{option}"' in text, line
