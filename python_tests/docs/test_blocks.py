"""Every code block of README and docs is executed, on small random models in place of those that it names.

What a block prints on these is nothing to compare; that it runs is. A block that cannot run here says why in
its fence: ```python skip="needs a GPU".
"""

import io
import re
import warnings

import pytest
from documents import PAGES, ROOT, blocks
from given import GIVEN

pytestmark = pytest.mark.usefixtures("one_thread")

SKIPPED = 20


@pytest.mark.parametrize("page", [page for page in PAGES if any(block.language for block in blocks(page))])
def test_the_blocks_of_a_page_run(page, desk, engram, monkeypatch):
    names = {"__name__": "__main__"} | GIVEN.get(page, dict)()
    for block in blocks(page):
        where = f"{page}:{block.line}"
        if block.skip is not None:
            continue
        if block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # a random model does not learn what it is told
                exec(compile("\n" * block.line + block.text, str(ROOT / page), "exec"), names)
        elif block.language in ("bash", "console"):
            for command in block.commands():
                if command.words[0] == "engram":
                    monkeypatch.setattr("sys.stdin", io.StringIO(command.typed))
                    status, _, err = engram(*command.words[1:])
                    assert status == 0, f"{where}: {' '.join(command.words)}\n{err}"
                elif command.words[0] == "cat":
                    (desk / command.words[1]).write_text(command.answer)
                else:
                    check_command(command.words, where)


def check_command(words, where):
    """Of a command that takes long: that what it starts is there, with the options that it is given."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)} <= set(targets), where
    elif words[0] in ("python", "bench/gpu.sh"):
        path = ROOT / (words[1] if words[0] == "python" else words[0])
        source = path.read_text()
        for option in (word for word in words[2:] if word.startswith("--")):
            name = option[2:].replace("-", "_")
            assert re.search(rf"{option}|\b{name}\b", source), f"{where}: {option}"
    else:
        assert words[0] in ("git", "export"), f"{where}: {words[0]}"


def test_few_blocks_are_left_out_and_each_says_why():
    skipped = [(page, block) for page in PAGES for block in blocks(page) if block.skip is not None]
    assert all(len(block.skip) > 10 for _, block in skipped)
    assert len(skipped) <= SKIPPED


def test_no_command_hides_in_a_block_without_a_language():
    for page in PAGES:
        for block in blocks(page):
            assert block.language or not re.search(r"^(\$ |engram |make )", block.text, re.MULTILINE), page


def test_lines_of_documents_are_short():
    long = [
        f"{page}:{number}"
        for page in PAGES
        for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), 1)
        # A table's row and a picture's text are one line.
        if len(line) > 120 and not line.lstrip().startswith(("|", "![")) and "](http" not in line
    ]
    assert not long, long


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150
