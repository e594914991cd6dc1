"""Tasks of the LM Evaluation Harness, on a saved model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resolvent.errors import ConfigError


def evaluate_tasks(
    directory: Path, tokenizer: Path, tasks: Sequence[str], *, task_path: Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Evaluate a model with the harness, which loads the model through Transformers.

    Args:
        directory: a folder that `save_model` or `save_pretrained` wrote.
        tokenizer: the folder of its tokenizer.
        tasks: names of tasks, of the harness or in `task_path`.
        task_path: folder with YAML files of further tasks.
        device: `cpu` or `cuda`.

    Returns:
        The results of the harness, for its `make_table`.

    Raises:
        ConfigError: the harness is not installed, a task is unknown, or the folder names another model.
    """
    # Transformers would load the model that this file names, from any source.
    if (adapter := directory / "adapter_config.json").exists():
        raise ConfigError(
            f"{adapter} may name another model than the one in {directory}: merge the adapters of a run with "
            "`resolvent convert RUN OUT --merge` and evaluate OUT, or remove the file"
        )
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(f"tasks need the LM Evaluation Harness ({error}): pip install 'resolvent[eval]'") from error
    import resolvent.hf  # noqa: F401  registers the models with Transformers

    manager = TaskManager(include_path=None if task_path is None else str(task_path))
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ConfigError(f"unknown task: {', '.join(unknown)}; `lm_eval ls tasks` lists those of the harness")
    arguments = {"pretrained": str(directory), "tokenizer": str(tokenizer), "use_safetensors": True}
    return lm_eval.simple_evaluate(
        model="hf", model_args=arguments, tasks=list(tasks), task_manager=manager, device=device
    )
