"""The house rules that a reader relies on, checked on the sources and the documents.

Why: a promise in a document that nothing checks becomes wrong. So commands, flags and metric names
in the documents must exist, imports must go one way, and functions fit a screen.

    python -m pytest tests/test_house.py
"""

import ast
import io
import re
import shlex
import subprocess
import tokenize
from functools import cache
from graphlib import TopologicalSorter
from importlib.util import find_spec

from conftest import ROOT, SCRIPT, python, read_jsonl

import evaluation.__main__
import export.__main__
import planning.__main__
import planning.goals
import train_diffusion_ddim as tdd
import trainlib
from augmentation.import_touch import parse_args as parse_import
from trainlib.errors import UserError


def product_files():
    """Tracked and new .py files but for the tests."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = listed.stdout.split()
    if listed.returncode:  # not a checkout: an archive of one
        names = [str(path.relative_to(ROOT)) for path in ROOT.rglob("[!.]*.py")]
    names = [name for name in names if not name.startswith(("tests/", ".")) and "/." not in name]
    return sorted(name for name in names if (ROOT / name).exists())


@cache
def sources():
    """The text of each product file, by its name."""
    files = {name: (ROOT / name).read_text("utf-8") for name in product_files()}
    assert len(files) > 50
    return files


def nodes(kind):
    """Every node of a kind in the syntax trees of the product files: (name, node)."""
    for name, source in sources().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, kind):
                yield name, node


def documents():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    """Every `python ...` line in a code block of the README and docs/: (document, argv)."""
    found = []
    for document in documents():
        text = document.read_text("utf-8")
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.M):
            if language not in ("", "bash", "sh", "console"):
                continue
            for line in block.replace("\\\n", " ").splitlines():
                line = line.strip().removeprefix("$ ")
                if re.match(r"(\w+=\S+ )*python3? (-m )?[\w.]+", line):
                    found.append((document.name, shlex.split(line, comments=True)))
    return found


def test_importing_the_script_is_pure():
    code = (
        "import sys, numpy, torch, torch.utils.data; before = torch.get_rng_state();"
        "old = set(sys.modules);"  # torch itself imports tqdm
        "import train_diffusion_ddim;"
        "assert torch.equal(torch.get_rng_state(), before);"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - old}))"
    )
    done = python("-c", code)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    loaded = set(ast.literal_eval(done.stdout))  # nothing else was printed
    assert not loaded & {"wandb", "matplotlib", "tqdm", "augmentation", "evaluation"}
    at_import = imports(at_top(ast.parse(SCRIPT.read_text("utf-8"))))
    assert not {name.split(".")[0] for name in at_import} & {"wandb", "matplotlib", "tqdm"}


def test_gestures_and_their_files_need_no_torch():
    names = "errors bars files provenance memory gestures gesture_files data_gate".split()
    modules = ", ".join(["trainlib", *(f"trainlib.{name}" for name in names)])
    done = python("-c", f"import sys, {modules}; print('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


# ---- one direction of imports ----------------------------------------------------------

SEES = {  # package or script: what of ours it may import
    "trainlib": "",
    "augmentation": "trainlib",
    "train_diffusion_ddim": "trainlib",
    "evaluation": "trainlib augmentation train_diffusion_ddim",
    "export": "trainlib train_diffusion_ddim",
    "planning": "trainlib augmentation train_diffusion_ddim evaluation",
    "benchmarks": "trainlib augmentation train_diffusion_ddim evaluation export planning",
}


def at_top(tree):
    """The imports of a module that run when it is imported."""
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    return tree


def imports(tree):
    """Every module that a syntax tree imports anywhere, `from a import b` as a and a.b."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide what they name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_imports_go_one_way():
    for name, source in sources().items():
        top = name.split("/")[0].removesuffix(".py")
        used = {m.split(".")[0] for m in imports(ast.parse(source))} & {*SEES, "tests"}
        assert used <= {top, *SEES[top].split()}, f"{name} imports {used}"


def test_no_module_imports_itself_by_way_of_others():
    names = [name.removesuffix(".py").replace("/", ".") for name in sources()]
    trees = [at_top(ast.parse(source)) for source in sources().values()]
    graph = {name: imports(tree) & {*names} for name, tree in zip(names, trees, strict=True)}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names a cycle
    assert set(order) == set(names)


def test_the_table_of_trainlib_has_every_module():
    listed = re.findall(r"^    (\w+) {2,}\S", trainlib.__doc__, re.M)
    modules = [path.stem for path in (ROOT / "trainlib").glob("[!_]*.py")]
    assert sorted(listed) == sorted(modules)


# ---- what can be read ------------------------------------------------------------------


def code_lines(source):
    """The numbers of the lines that hold code: no blanks, comments or docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def test_the_script_is_read_in_one_sitting():
    source = SCRIPT.read_text("utf-8")
    assert len(source.splitlines()) <= 1600 and len(code_lines(source)) <= 1050
    example = (
        'def f():\n    """Doc.\n\n    More.\n    """\n    # why\n\n    return """a\n    b"""\n'
    )
    assert code_lines(example) == {1, 8, 9}


def test_functions_fit_a_screen():
    for name, node in nodes(ast.FunctionDef | ast.AsyncFunctionDef):
        length = node.end_lineno - node.lineno + 1
        assert length <= 60, f"{name}:{node.lineno} {node.name} has {length} lines"


def test_checkpoints_and_arrays_are_never_unpickled():
    unsafe = r"weights_only\s*=\s*False|allow_pickle\s*=\s*True|import pickle"
    for name, source in sources().items():
        assert not re.search(unsafe, source), name
    for name, node in nodes(ast.Call):
        if ast.unparse(node.func) in ("torch.load", "np.load"):
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            safe = keywords.get("weights_only") == "True" or keywords.get("allow_pickle") == "False"
            assert safe, f"{name}:{node.lineno}"


def test_sections_are_in_the_order_that_the_docstring_states():
    text = SCRIPT.read_text("utf-8")
    banners = re.findall(r"^# -{80,}\n# ([A-Z ]+?)(?: —.*)?\n# -{80,}$", text, re.MULTILINE)
    stated = re.search(r"Sections: (.*?)\.\n", tdd.__doc__, re.DOTALL).group(1)
    assert banners == [name.strip() for name in stated.replace("\n", " ").split(",")]


def expanded(name):
    """`a_{x,y}` as a_x, a_y; `a_{name}` as the pattern of any a_..."""
    group = re.search(r"\{([^}]*)\}", name)
    if not group:
        return [re.escape(name).replace("ANY", r"[\w.]+")]
    head, tail = name[: group.start()], name[group.end() :]
    choices = group.group(1).split(",")
    if len(choices) == 1:
        choices = ["ANY"]
    return [whole for c in choices for whole in expanded(head + c.strip() + tail)]


def test_every_logged_key_is_documented(straight_run):
    text = (ROOT / "docs" / "METRICS.md").read_text("utf-8")
    quoted = re.findall(r"`([^`\s]+)`", text)
    documented = {name.split("/", 1)[-1] for word in quoted for name in expanded(word)}
    assert len(documented) > 30
    keys = set().union(*read_jsonl(straight_run / "metrics.jsonl")) - {"step"}
    names = {key: key.split("/", 1)[1] for key in keys}
    assert not {k for k, n in names.items() if not any(re.fullmatch(d, n) for d in documented)}


def test_commands_of_the_documents_exist():
    assert len(commands()) >= 3
    for document, argv in commands():
        argv = [arg for arg in argv if not re.match(r"[A-Z_]+=", arg)][1:]
        if argv[0] == "-m":
            module = argv[1]
            spec = find_spec(module)
            assert spec, f"{document}: python -m {module}"
            if spec.submodule_search_locations:  # a package runs its __main__
                assert find_spec(f"{module}.__main__"), f"{document}: python -m {module}"
        else:
            assert argv[0].startswith("-") or (ROOT / argv[0]).exists(), f"{document}: {argv}"


PARSERS = {
    "train_diffusion_ddim.py": tdd.parse_args,
    "evaluation": evaluation.__main__.parse_args,
    "planning": planning.__main__.parse_args,
    "planning.goals": planning.goals.parse_args,
    "export": export.__main__.parse_args,
    "augmentation.import_touch": parse_import,
}


def test_flags_of_the_documents_exist(capsys):
    checked = set()
    for document, argv in commands():
        name = next((word for word in argv if word in PARSERS), None)
        if name is None:
            continue
        flags = argv[argv.index(name) + 1 :]
        flags = ["1" if re.fullmatch(r"[A-Z]+", arg) else arg for arg in flags]  # placeholders
        flags = [arg for arg in flags if arg not in ("...", "…")]
        try:
            PARSERS[name](flags)
        except UserError as error:
            raise AssertionError(f"{document}: {' '.join(argv)}: {error}") from None
        except SystemExit as stop:
            assert stop.code == 0
        checked.add(name)
    assert checked == set(PARSERS)


def test_files_named_in_the_readme_exist():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", text):
        assert (ROOT / target).exists(), target


def test_what_a_run_prints_to_do_next_exists(straight_run):
    out = (straight_run / "stdout.txt").read_text("utf-8")
    modules = re.findall(r"python -m ([\w.]+)", out)
    assert modules
    for module in modules:
        assert find_spec(module) and find_spec(f"{module}.__main__"), module


def test_requirements_pin_the_users_list_and_what_the_report_needs():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(re.split("==", line)[0] for line in lines) == [
        *("matplotlib", "numpy", "scikit-learn", "torch", "tqdm", "wandb")
    ]
    assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines)
