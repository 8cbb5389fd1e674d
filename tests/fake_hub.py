"""A Hub that records what is uploaded, for tests of `push_to_hub`."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi


class FakeHub(HfApi):
    """Keeps the files of each repository in `repositories`."""

    def __init__(self):
        super().__init__()
        self.repositories: dict[str, dict[str, bytes]] = {}

    def create_repo(self, repo_id, **kwargs):
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        files = self.repositories.setdefault(repo_id, {})
        files |= {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}


def use_fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """Makes Transformers upload to a [`FakeHub`], which is returned."""
    hub = FakeHub()
    card = SimpleNamespace(save=lambda path: Path(path).touch())
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *unused, **kwargs: card)
    return hub
