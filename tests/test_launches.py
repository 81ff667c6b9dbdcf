"""What forks a launch says and leaves behind what a launcher of its own would."""

import pytest

from launches import launch

pytestmark = [pytest.mark.engines, pytest.mark.timeout(600)]


@pytest.mark.parametrize(("engine", "code"), [("single", 2), ("ddp", 1), ("zero2", 1)])
def test_a_launch_that_fails_tells_its_own_reason_and_the_next_one_starts(engine, code, tmp_path):
    for number in range(2):
        missing = str(tmp_path / f"{number}.yaml")
        said = launch(engine, "run_script.py", missing, returns=code)
        assert f"{number}.yaml" in said and "no such recipe" in said
        assert f"{1 - number}.yaml" not in said
    with pytest.raises(AssertionError) as caught:
        launch(engine, "run_script.py", missing)
    told = str(caught.value)
    assert told.startswith(f"{engine} ended with {code}:") and "no such recipe" in told
    launch(engine, "run_script.py", "--help")
