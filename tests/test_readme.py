"""The README: short, true, and every Python snippet in it runs."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SHELL = "\n".join(re.findall(r"^```bash\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^(?:.* && )?(hf-weightgen [^\n#]+)", SHELL, flags=re.MULTILINE)
SCRIPTS = re.findall(r"examples/\w+\.py", README)


def test_it_is_short_and_starts_with_the_snippet():
    lines = README.splitlines()
    assert len(lines) < 150
    snippet = [number for number, line in enumerate(lines, start=1) if "adapter.to_model(0)" in line]
    assert snippet and snippet[0] < 20


def test_it_names_no_path_of_a_machine():
    assert not re.findall(r"(?<![\w.:/])/(?:home|root|work|tmp|Users|mnt|data|opt)/", README)


def test_every_relative_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_every_named_script_exists():
    assert SCRIPTS and [script for script in SCRIPTS if not (ROOT / script).exists()] == []


def test_the_set_up_commands_are_those_of_ci_and_make():
    install = 'pip install -c constraints.txt -e ".[test]"'
    assert f"{install} && pytest" in README
    for other in (".ci/run", "Makefile", "CONTRIBUTING.md"):
        assert install in (ROOT / other).read_text(), other


def test_python_snippets_run(tmp_path, monkeypatch, hub):
    """In the order of the page and in one namespace, as a reader would run them; the Hub is one on loopback."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, "README.md", "exec"), namespace)


def test_every_command_line_parses():
    import shlex

    from typer.main import get_command

    from hf_weightgen.cli import app

    assert COMMANDS
    for line in COMMANDS:
        command, args = get_command(app), shlex.split(line)[1:]
        parent = None
        while hasattr(command, "commands"):  # a group: its first argument names the command
            assert args and args[0] in command.commands, f"{line!r}: no command {args[:1]}"
            parent = command.make_context(command.name, [], parent=parent, resilient_parsing=True)
            command, args = command.commands[args[0]], args[1:]
        command.make_context(line, args, parent=parent)  # raises on an option or a value that does not exist
