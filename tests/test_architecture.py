"""The arrows of the project: who may import whom, who owns which library, and how straight the line is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "smoltrain"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Lowest first: a module imports only modules of lower layers (or of its own room).
LAYERS = (
    {"redact"},
    {"errors", "exported", "advice", "console", "awake", "backstop"},
    {"schema", "tree", "files", "wandb_env"},
    {"contradictions", "reshape", "compiling", "sums", "cores", "garbage", "rendezvous", "plan"},
    {"config"},
    {"identity"},
    {"ds_config", "model", "data", "dist", "gradients", "plots", "runfolder", "watchdog"},
    {"flat", "kernels", "handing", "wandb_id", "wandb_run"},
    {"zero"},
    {"generate", "engine", "track", "huggingface", "ledger", "spikes", "estimate"},
    {"checkpoint", "step", "choices", "beforehand"},
    {"loading"},
    {"origin", "card", "verify", "inspection"},
    {"export"},
    {"push", "demo", "train", "supervise", "bench"},
    {"cli"},
)
OWNERS = {
    "torch.distributed": "dist.py",
    "deepspeed": "engine.py",
    "wandb": "wandb_run.py",
    "flash_attn": "model/attention.py",
    "matplotlib": "plots.py",
    "gradio": "demo.py",
}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in the file, but not under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def room(path: Path) -> str:
    """'data' for smoltrain/data/rows/loader.py, 'plan' for smoltrain/schedule.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def layer(name: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nouns_import_only_nouns_below_them(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    used = {n.split(".")[1] for n in imports(path) if n.startswith("smoltrain.")} - {own, "__version__"}
    above = sorted(name for name in used if layer(name) > layer(own))
    assert not above, f"{own} imports {above}, which stand above it"
    beside = sorted(name for name in used if layer(name) == layer(own))
    assert len(beside) <= 1, f"{own} imports {beside} of its own layer"


@pytest.mark.parametrize(("library", "owner"), OWNERS.items())
def test_each_big_library_has_one_owner(library: str, owner: str) -> None:
    users = {
        str(p.relative_to(PACKAGE))
        for p in MODULES
        if any(name == library or name.startswith(library + ".") for name in imports(p))
    }
    assert users <= {owner}
    if library != "flash_attn":  # imported by name, only where it is asked for
        assert users == {owner}


def test_nothing_but_the_entry_point_imports_train() -> None:
    users = [p.name for p in MODULES if "smoltrain.train.run" in imports(p)]
    assert users == []
    assert "smoltrain.train.run" in imports(ROOT / "launch" / "train.py")


def test_importing_the_command_is_cheap() -> None:
    heavy = {"torch", "deepspeed", "wandb", "matplotlib", "transformers"}
    top = {
        name.split(".")[0]
        for node in ast.parse((PACKAGE / "cli.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)])
    }
    assert not top & heavy


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 500
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.name != "life":  # train.py's table of contents
            assert (node.end_lineno or 0) - node.lineno <= 75, f"{path.name}: {node.name}"
