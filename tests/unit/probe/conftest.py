import pytest

from tests.support.parrot import probed


@pytest.fixture(scope="package")
def parrot(tmp_path_factory):
    return probed(tmp_path_factory.mktemp("parrot"))
