import subprocess
import sys
from pathlib import Path

from resolvent.runs import RUN_FILE, fixed_files, run_of

GOLDEN = Path(__file__).parent / "data" / "golden" / "format-3" / "run"


def loaded_by(code: str) -> set[str]:
    """Modules of training that Python has loaded after some code."""
    ask = "import sys; print(*(name for name in sys.modules if name.split('.')[:2] == ['resolvent', 'training']"
    script = f"{code}\n{ask} or name == 'accelerate'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_a_trained_model_loads_without_training():
    code = "import resolvent.cli.generate; from pathlib import Path; from resolvent.runs import load_trained\n"
    assert loaded_by(f"{code}load_trained(Path({str(GOLDEN)!r}), 'cpu')") == set()


def test_generating_loads_nothing_of_training_but_the_fields_of_its_options():
    arguments = ["resolvent", "generate", str(GOLDEN), "--max-new-tokens", "1"]
    code = (
        f"import sys; from resolvent.cli import main; sys.argv = {arguments!r}\ntry: main()\nexcept SystemExit: pass\n"
    )
    assert loaded_by(code) == {"resolvent.training", "resolvent.training.config"}


def test_a_checkpoint_belongs_to_its_run():
    assert run_of(Path("runs/a")) == run_of(Path("runs/a/checkpoints/step-00000001")) == Path("runs/a")


def test_the_files_that_never_change_are_those_of_a_run():
    assert RUN_FILE in fixed_files() and all((GOLDEN / name).exists() for name in fixed_files())
