"""What the pages say is so: programs, commands, options, links, messages, names of tests."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from layers import needs_scaler

DIGITS_PAGE = ROOT / "studies/digits/configs/README.md"


@needs_scaler
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
        path.read_text()
        for room in ("cbn_mmdet/norm", "cbn_mmdet/hooks", "tools")
        for path in (ROOT / room).rglob("*.py")
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
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*/README.md")]
    pages.append(DIGITS_PAGE)
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


def test_lines_of_torchs_kernels():
    """The page is of the torch that requirements.txt pins; another one may be installed."""
    _, page = (ROOT / "docs" / "gpu.md").read_text().split("## What only a GPU runs")
    page = page.split("\n## ")[0]
    version = re.search(r"^torch==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    assert f"torch\n{version}" in page
    cited = re.findall(r"`([^`]+)` (\d+)(?=[),| ])", page)
    assert len(cited) == 22
    if torch.__version__.split("+")[0] != version:
        pytest.skip(f"lines are of torch {version}")
    header = Path(torch.__file__).parent / "include/ATen/native/cuda/Normalization.cuh"
    lines = header.read_text().splitlines()
    for words, number in cited:
        assert words in lines[int(number) - 1], (words, number)


def test_each_page_is_listed():
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in ROOT.glob("docs/*.md")} - {"README.md"}
    assert {name for name in pages if f"({name})" not in index} == set()


# What runs each command of the README and the pages: a script that is kept, or a test, with
# another config or fewer images than on the page.
RUN_BY = {
    r"make test( PYTEST_ARGS=.*)?": ".ci/run",
    "make train": "test_tools/test_training.py",  # its recipe's three commands
    "make sweep": "test_configs.py",
    "make variants": "test_tools/test_training.py",  # likewise
    "make coco-check CONFIG=.*": "test_tools/test_preflight.py::test_coco",
    r"python studies/digits/build\.py .*": "test_studies/test_digits.py",
    r"python tools/train\.py .*": "test_tools/test_training.py",
    r"python tools/preflight\.py .*": "test_tools/test_preflight.py",
    r"python tools/test\.py .*": "test_tools/test_training.py::test_test",
    r"python tools/report\.py .*": "test_tools/test_training.py::test_report",
    r"python tools/publish\.py .*": "test_tools/test_publish.py",
    r"python tools/tables\.py .*": "test_tools/test_tables.py",
    r"python studies/compensation\.py .*": "test_studies/test_compensation.py",
    **{
        rf"python studies/{script}\.py {name}(-apart)?( .*)?": (
            f"test_studies/test_{script}.py::test_{name}"
        )
        for script, names in (
            ("evidence", "classifier exactly momentum detector ablation continued levels"),
            ("benchmark", "layer host step inference memory growth count"),
            ("cost", "model collectives"),
        )
        for name in names.split()
    },
    # With images that the test draws, in folders laid out like a clone's.
    r"git clone .* data/\w+|python studies/evidence\.py (photos|cells)(-all)?": (
        "test_studies/test_photos.py"
    ),
    r"make gpu( GPU_ARGS=.*)?|python studies/gpu\.py .*": "test_studies/test_gpu.py",
    r"python tests/zoo\.py": "test_zoo.py",
    r"tools/dist_train\.sh .*": "test_distributed.py",
    r"tools/dist_test\.sh .*": "test_distributed.py",
    r"mim=.*|python \$mim/tools/train\.py .*|mim train mmdet .*": "test_wheel.py",
    # Set-up commands, which the Makefile's recipe also runs.
    r"(python -m )?pip install .*|source .*": "Makefile",
    r'python -c "import .*': "Makefile",
}


def commands():
    """Yields each command line of the pages, without its comment, after the page's name."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), DIGITS_PAGE]
    for page in pages:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                yield page.name, re.sub(r"(^|\s+)#.*", "", line).strip()


def test_commands_are_run_by_something():
    used = set()
    for page, command in commands():
        if re.fullmatch(r"|for .*; do|done|\w+=\S+", command):
            continue
        found = {pattern for pattern in RUN_BY if re.fullmatch(pattern, command)}
        assert found, f"{page}: {command}"
        used |= found
    assert used == set(RUN_BY)
    for runner in RUN_BY.values():
        path, _, name = runner.partition("::")
        text = (ROOT / ("tests" if path.endswith(".py") else "") / path).read_text()
        assert not name or f"def {name}(" in text, runner


def test_commands_are_the_projects():
    """Every tool, option and make target that a page or the README names exists."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, command in commands():
        assert set(re.findall(r"^make ([\w-]+)", command)) <= targets, f"{page}: {command}"
        ours = r"python (?:\S*/)?((?:tools|studies)(?:/\w+)+\.py)(.*)"
        for tool, rest in re.findall(ours, command):
            read = [ROOT / tool, *(ROOT / "tools/common").glob("*.py")]
            text = "".join(path.read_text() for path in read)
            for option in re.findall(r"(?<=\s)--[a-z0-9-]+", rest):
                assert f'"{option}"' in text, f"{page}: {command}"
