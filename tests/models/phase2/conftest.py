import pytest

from resolvent import Phase2IntegratedModel

from ..small import PHASE2

SMALL, small_model = PHASE2.sizes, PHASE2.model


@pytest.fixture
def model() -> Phase2IntegratedModel:
    return small_model()
