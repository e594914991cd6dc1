import pytest

from resolvent import Phase1IntegratedModel

from ..small import PHASE1

SMALL, small_model = PHASE1.sizes, PHASE1.model


@pytest.fixture
def model() -> Phase1IntegratedModel:
    return small_model()
