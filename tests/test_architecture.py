"""The house: who may import whom, who owns which library, and that its names are found by those who look for them."""

import ast
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.architecture import (
    DATA_FLOORS,
    FLOORS,
    LISTING,
    PICTURE,
    draw_floors,
    find_modules,
    list_rooms,
    module_imports,
    read_imports,
    room_of,
    write_listing,
)

ROOT = Path(__file__).parent.parent
MODULES = find_modules()
ARROWS = module_imports()
ENTRY = {"smoltrain", "smoltrain.__main__"}  # above the floors: the package itself, and `python -m smoltrain`

# One module (or folder) knows each big library; with another library in its place, one file changes.
OWNERS = {
    "torch.distributed": ("smoltrain.distributed.world",),
    "deepspeed": ("smoltrain.engine.deepspeed_private",),
    "wandb": ("smoltrain.run.wandb_connection", "smoltrain.run.wandb_uploads"),
    "torch.utils.tensorboard": ("smoltrain.run.tensorboard_backend",),
    "mlflow": ("smoltrain.run.mlflow_backend",),
    "flash_attn": ("smoltrain.kernels.flash_attention", "smoltrain.kernels.flash_attention_4"),
    "liger_kernel": ("smoltrain.kernels.loss",),
    "matplotlib": ("smoltrain.run.plots", "smoltrain.run.scaling_plot", "smoltrain.monitor.comparison_plot"),
    "gradio": ("smoltrain.inference.demo",),
    "jinja2": ("smoltrain.report.page",),
    "lm_eval": ("smoltrain.evaluation.harness", "smoltrain.evaluation.harness_model"),
    # The harness wants a task's documents in the form that they have there.
    "datasets": ("smoltrain.data.documents.hub", "smoltrain.evaluation.harness"),
    "pyarrow": ("smoltrain.data.documents.read_parquet",),
    "fsspec": ("smoltrain.data.documents",),
    "tokenizers": ("smoltrain.data.tokenizers",),
    "typer": ("smoltrain.cli",),
    # An export's own two files run without smoltrain.
    "transformers": (
        "smoltrain.model.transformers_model", "smoltrain.model.transformers_private",
        "smoltrain.inference.chat_template", "smoltrain.export.modeling_smoltrain", "smoltrain.export.reload",
    ),
    "huggingface_hub": (
        "smoltrain.data.documents.hub", "smoltrain.data.tokenizers.hub", "smoltrain.export.push",
        "smoltrain.export.card_metadata",
    ),
}  # fmt: skip
IMPORTED_BY_NAME = {"flash_attn", "liger_kernel"}  # through importlib, only where a run asks for it
UPLOADS = ("smoltrain.export.push",)  # alone may write to the Hub

# Modules without a test file of their name -> why, and the tests that cover them.
TESTED_ELSEWHERE: dict[str, tuple[str, str]] = {
    "smoltrain.__main__": ("two lines, run as a command", "tests/test_cli.py"),
    "smoltrain.version": ("a constant", "tests/test_cli.py, tests/test_wheel.py"),
    "smoltrain.config.hub_licenses": ("a list", "tests/export/test_card_metadata.py"),
    **{
        f"smoltrain.cli.{module}": ("parts of one command, tested through it", "tests/test_cli.py")
        for module in ("app", "arguments", "evaluation", "machine", "models", "prepare", "recipes", "runs", "training")
    },
    **{
        f"smoltrain.data.tokens.{module}": (
            "parts of one preparation, tested in it",
            "tests/data/tokens/test_prepare.py",
        )
        for module in ("load_prepared", "plan_preparation")
    },
    "smoltrain.data.tokenizers.hub": (
        "loads from the small Hub that datasets are loaded from",
        "tests/data/documents/test_hub.py, tests/data/tokenizers/test_by_name.py",
    ),
    "smoltrain.doctor.exchange": (
        "what ranks exchange, in checks that are tested",
        "tests/doctor/test_all_reduce.py, tests/doctor/test_hosts.py",
    ),
    "smoltrain.doctor.needs": ("numbers of the estimate, for two checks", "tests/doctor/test_limits.py"),
    "smoltrain.doctor.probe": ("runs in a process of its own", "tests/doctor/test_software.py"),
    "smoltrain.engine.adamw": (
        "torch's own, and one pass that is compared with it",
        "tests/engine/test_optimizer.py, tests/engine/test_once_per_step.py",
    ),
    "smoltrain.engine.build_engine": (
        "makes what is tested",
        "tests/engine/test_engine.py, tests/engine/test_reduction.py",
    ),
    "smoltrain.engine.master_weights": (
        "where the masters lie, for Muon and for the norms of layers",
        "tests/engine/test_muon.py, tests/engine/test_layer_weights.py",
    ),
    "smoltrain.engine.optimizer_kind": (
        "abstract; its classes are tested",
        "tests/engine/test_optimizer.py, tests/engine/test_muon.py",
    ),
    "smoltrain.engine.step_method": (
        "a protocol; its classes are tested",
        "tests/engine/test_deepspeed_steps.py, tests/engine/test_once_per_step.py",
    ),
    "smoltrain.export.reload": (
        "runs in a process of its own, without smoltrain",
        "tests/export/test_export.py, tests/export/test_verify.py",
    ),
    "smoltrain.inference.find_run": ("what is found is loaded there", "tests/inference/test_load.py"),
    "smoltrain.model.interface": (
        "abstract; its classes are tested",
        "tests/model/test_decoder.py, tests/model/test_transformers_model.py",
    ),
    **{
        f"smoltrain.report.{module}": ("parts of one page, tested in it", "tests/report/test_report.py")
        for module in ("page", "read_run", "record_sections", "training_sections")
    },
    "smoltrain.run.sink": (
        "protocols; what implements them is tested",
        "tests/run/test_guarded_sink.py, tests/run/test_wandb_run.py",
    ),
    "smoltrain.run.wandb_uploads": ("what WandbRun hands over, tested through it", "tests/run/test_wandb_run.py"),
    "smoltrain.training.bad_steps": (
        "what a step does then",
        "tests/training/test_step.py, tests/training/test_spikes.py",
    ),
    "smoltrain.training.derived_facts": ("what W&B's files of a real run are asked for", "tests/run/test_track.py"),
    "smoltrain.training.run_tasks": ("the tasks of a run", "tests/training/test_evaluate_tasks.py"),
    "smoltrain.training.session": ("what is open; opened in", "tests/training/test_open_session.py"),
    "smoltrain.training.unread_update": ("numbers of a step", "tests/training/test_step.py"),
    "smoltrain.training.step_result": (
        "what a step returns",
        "tests/training/test_step.py, tests/training/test_spikes.py",
    ),
    "smoltrain.training.assess_failure": (
        "what the pages of real failures say",
        "tests/training/test_out_of_memory.py, tests/launch/test_killed_rank.py",
    ),
    "smoltrain.training.backstop": ("a process beside the watchdog", "tests/training/test_watchdog.py"),
}
# Test files below a room that are about more than one module -> what they are about.
NAMED_AFTER_A_TOPIC = {
    "tests/kernels/test_without_a_gpu.py": "what all kernels together do on a device, proven without one",
    "tests/engine/test_compiled_region.py": "all blocks compiled as one, under every ZeRO stage and way of reducing",
    "tests/engine/test_cuda_graphs.py": "what a replay overwrites, and who holds on to it",
    "tests/engine/test_fused_projections.py": "q, k, v and gate, up as one product each, under the engine",
    "tests/model/test_documents.py": "document masks of the decoder, through every kernel",
    "tests/model/test_transformers_documents.py": "document masks of transformers' classes",
}
FORBIDDEN_NAMES = {"of", "at", "look", "asked", "end", "said", "told", "again", "settle", "spent"}


def floor_of(room: str, floors: tuple[tuple[str, ...], ...]) -> int:
    """0 is the top."""
    (number,) = (number for number, floor in enumerate(floors) if room in floor)
    return number


def stands_below(used: str, own: str, floors: tuple[tuple[str, ...], ...]) -> bool:
    """Whether a module of room `own` may import from room `used`; '' is none of these rooms."""
    return used in (own, "") or floor_of(used, floors) > floor_of(own, floors)


def data_room_of(module: str) -> str:
    """'rows' for smoltrain.data.rows.loader; '' outside of smoltrain/data, and for the package itself."""
    room, _, rest = module.removeprefix("smoltrain.").partition(".")
    return rest.partition(".")[0] if room == "data" else ""


# --- floors


def test_every_room_has_its_place_on_one_floor():
    assert Counter(room for floor in FLOORS for room in floor) == Counter(
        {room_of(name) for name in MODULES} - {"", "__main__"}
    )
    assert Counter(room for floor in DATA_FLOORS for room in floor) == Counter(
        {data_room_of(name) for name in MODULES} - {""}
    )


def test_a_module_imports_from_its_own_room_and_from_floors_below():
    wrong = [
        f"{module} imports {used}"
        for module in sorted(set(MODULES) - ENTRY)
        for used in sorted(ARROWS[module])
        if not stands_below(room_of(used), room_of(module), FLOORS)
    ]
    assert wrong == []


def test_a_module_of_data_imports_from_its_own_room_and_from_floors_below():
    wrong = [
        f"{module} imports {used}"
        for module in sorted(MODULES)
        for used in sorted(ARROWS[module])
        if data_room_of(module) and not stands_below(data_room_of(used), data_room_of(module), DATA_FLOORS)
    ]
    assert wrong == []


def find_circle(arrows: dict[str, set[str]]) -> list[str]:
    """Names along one circle of imports, the first of them again at the end; [] if there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for used in sorted(arrows[name]):
            if circle := visit(used, [*path, name]):
                return circle
        done.add(name)
        return []

    return next((circle for name in sorted(arrows) if (circle := visit(name, []))), [])


def test_no_files_import_each_other_in_a_circle():
    assert find_circle(ARROWS) == []


def test_a_circle_is_found_and_told_by_name():
    assert find_circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert find_circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_what_counts_as_an_import(tmp_path: Path):
    (tmp_path / "smoltrain").mkdir()
    for name, text in {
        "__init__": "",
        "lazy": "def f():\n    from smoltrain import deep\n    import smoltrain.direct\n",
        "typed": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from smoltrain.deep import Name\n"
            "else:\n    from smoltrain.direct import name\n"
        ),
        "deep": "",
        "direct": "",
    }.items():
        (tmp_path / "smoltrain" / f"{name}.py").write_text(text, encoding="utf-8")
    arrows = module_imports(tmp_path)
    assert arrows["smoltrain.lazy"] == {"smoltrain.deep", "smoltrain.direct"}
    assert arrows["smoltrain.typed"] == {"smoltrain.deep", "smoltrain.direct"}


def test_the_picture_is_drawn_from_this_tree():
    assert PICTURE.read_text(encoding="utf-8") == draw_floors(), "anew: .venv/bin/python docs/architecture.py"


def test_contributing_lists_what_the_folders_say_of_themselves():
    page = LISTING.read_text(encoding="utf-8")
    assert page == write_listing(page, list_rooms()), "anew: .venv/bin/python docs/architecture.py"


# --- owners


@pytest.mark.parametrize("library", OWNERS)
def test_each_big_library_has_one_owner(library: str):
    users = {
        module
        for module, path in MODULES.items()
        if any(name == library or name.startswith(f"{library}.") for name in read_imports(path))
    }
    strangers = {user for user in users if not user.startswith(OWNERS[library])}
    assert strangers == set(), f"{library} belongs to {OWNERS[library]}"
    assert users or library in IMPORTED_BY_NAME, f"nothing imports {library}: its owner is another now"


@pytest.mark.parametrize("library", sorted(IMPORTED_BY_NAME))
def test_a_library_that_is_imported_by_name_is_named_by_its_owner_alone(library: str):
    named = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if node.value == library or node.value.startswith(f"{library}.")
    }
    assert named
    assert all(name.startswith(OWNERS[library]) for name in named)


def test_only_push_can_write_to_the_hub():
    calls = {"upload_folder", "upload_file", "create_repo", "create_commit", "upload_large_folder"}
    users = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.alias)
        if (node.attr if isinstance(node, ast.Attribute) else node.name) in calls
    }
    assert users == set(UPLOADS)


def test_only_the_two_ways_to_start_import_the_loop():
    starts = {"smoltrain.launch.rank", "smoltrain.launch.in_process"}  # a process of its own, and a program's
    assert {module for module, used in ARROWS.items() if "smoltrain.training.run" in used} == starts


def test_importing_the_command_is_cheap():
    heavy = [
        "torch",
        "deepspeed",
        "wandb",
        "matplotlib",
        "transformers",
        "datasets",
        "numpy",
        "pydantic",
        "rich.console",
    ]
    script = f"import json, sys, smoltrain.cli; print(json.dumps([name for name in {heavy} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert json.loads(done.stdout) == []


# --- names


def definitions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Every function, method and class of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node


def test_no_two_public_functions_or_classes_share_a_name():
    owners: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                owners.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in owners.items() if len(modules) > 1} == {}


def test_functions_and_classes_are_not_named_by_filler_words():
    named = [f"{module}: {node.name}" for module, path in MODULES.items() for node in definitions(path)]
    assert [name for name in named if name.split(": ")[1].strip("_").lower() in FORBIDDEN_NAMES] == []


def test_no_module_uses_what_another_keeps_for_itself():
    taken = [
        f"{module} imports {name}"
        for module, path in MODULES.items()
        for name in sorted(read_imports(path))
        if name.startswith("smoltrain.") and name.rpartition(".")[2].startswith("_")
    ]
    assert taken == []


# --- tests


def mirror_of(module: str) -> Path:
    """tests/data/rows/test_loader.py for smoltrain.data.rows.loader."""
    *folders, name = module.split(".")[1:]
    return ROOT.joinpath("tests", *folders, f"test_{name}.py")


def test_every_module_has_a_test_file_of_its_name_or_says_why_not():
    files = [module for module, path in MODULES.items() if path.name != "__init__.py"]
    without = {module for module in files if not mirror_of(module).is_file()}
    assert without == set(TESTED_ELSEWHERE)
    for why, covered in TESTED_ELSEWHERE.values():
        assert why
        assert [name for name in covered.split(", ") if not (ROOT / name).is_file()] == []


def test_every_test_file_below_a_room_is_named_after_a_module():
    rooms = [path for path in (ROOT / "smoltrain").iterdir() if path.is_dir() and (path / "__init__.py").is_file()]
    named = {mirror_of(module) for module in set(MODULES) - {"smoltrain"}}
    found = {path for room in rooms for path in (ROOT / "tests" / room.name).rglob("test_*.py")}
    assert {str(path.relative_to(ROOT)) for path in found - named} == set(NAMED_AFTER_A_TOPIC)
