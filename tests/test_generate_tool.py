"""tools/generate.py at the shell, and what importing costs."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import generate_fixture as tiny
import pytest

from codellama_jax import convert

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.make_llama(tmp_path_factory.mktemp("tokenizer"))


def test_importing_the_package_imports_no_jax():
    code = "import codellama_jax, sys; assert not {'jax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_help_is_quick_and_has_examples():
    out = subprocess.run(
        [sys.executable, "-X", "importtime", "tools/generate.py", "--help"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    assert "generate.py infill --checkpoint" in out.stdout
    assert " jax" not in out.stderr and " numpy" not in out.stderr


@pytest.fixture(scope="module")
def shell(llama, tmp_path_factory):
    """tools/generate.py on a folder of the random weights: (exit code, what it printed, error)."""
    folder = tmp_path_factory.mktemp("shell") / "hf"
    convert.export_hf(tiny.params(), tiny.MODEL, folder, llama.tokenizer.path)
    spec = importlib.util.spec_from_file_location("generate_tool", ROOT / "tools/generate.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def run(command, *args, stdin="", checkpoint=folder):
        out, errors = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", errors)
            args = [command, "--checkpoint", str(checkpoint), "--max-new-tokens", "20", *args]
            code = tool.main(args)
        return code, out.getvalue(), errors.getvalue()

    return run


def test_the_shell_shows_what_the_face_returns(llama, shell, tmp_path):
    how = {"max_new_tokens": 20}
    expected = llama.complete("def f(x):\r\n", **how)
    assert shell("complete", "--prompt", "def f(x):\r\n") == (0, expected, "")
    assert shell("complete", stdin="def f(x):\r\n") == (0, expected, "")
    middle = llama.infill("a = ", "\n", **how)
    assert shell("infill", "--prefix", "a = ", "--suffix", "\n") == (0, middle, "")
    gap = tmp_path / "gap.py"
    gap.write_text("a = <FILL>\n")
    assert shell("infill", "--file", str(gap)) == (0, middle, "")
    assert shell("infill", "--whole", stdin="a = <FILL>\n") == (0, f"a = {middle}\n", "")
    warm = {"temperature": 0.9, "top_p": 0.8, "seed": 3, "suffix_first": True}
    flags = "--temperature 0.9 --top-p 0.8 --seed 3 --suffix-first".split()
    assert shell("infill", *flags, stdin="a = <FILL>\n")[1] == llama.infill(
        "a = ", "\n", **how, **warm
    )
    dialog = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Hi"}]
    answer = llama.chat(dialog, **how)
    assert shell("chat", "--system", "Be brief", "--prompt", "Hi") == (0, answer, "")


def test_the_shell_says_in_one_line_what_is_wrong(shell, tmp_path):
    def refused(pattern, *args, **how):
        code, out, error = shell(*args, **how)
        assert (code, out, error.count("\n")) == (2, "", 1)
        assert error.startswith("error: ") and pattern in error

    refused("standard input has 2 times <FILL>", "infill", stdin="<FILL><FILL>")
    refused("give both --prefix and --suffix", "infill", "--prefix", "a")
    refused("No such file", "infill", "--file", str(tmp_path / "nothing"))
    refused("there is no folder", "complete", "--prompt", "a", checkpoint=tmp_path / "nothing")
    refused("has no effect at temperature=0", "complete", "--prompt", "a", "--seed", "1")
    refused("make 3011, but", "complete", "--max-new-tokens", "3000", "--prompt", "def f(x): pass")
