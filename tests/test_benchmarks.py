"""The tables of benchmarks and prompts hold together, and say what the published ones say."""

import pytest

from mllm_cl.data.benchmarks import benchmark, names, templates
from mllm_cl.data.classes import stage_sizes


@pytest.mark.parametrize("name", names())
def test_every_benchmark_has_splits_that_can_be_and_prompts(name):
    facts = benchmark(name)
    assert facts.of is None or facts.of > facts.classes
    for first, increment in facts.stages():
        sizes = stage_sizes(facts.classes, first, increment)
        assert sum(sizes) == facts.classes and set(sizes[1:]) == {increment}
    for text in templates(facts.templates):
        assert text.count("{}") == 1 and "[" not in text and "]" not in text


@pytest.mark.parametrize(
    ("key", "number"),
    [("cifar224", 18), ("objectnet", 7), ("imagenetr", 7), ("food101", 1), ("cub", 1)]
    + [("aircraft", 2), ("cars", 8), ("sun", 2), ("ucf101", 48)],
)
def test_prompts_are_as_many_as_published_and_all_different(key, number):
    assert len(set(templates(key))) == len(templates(key)) == number


def test_the_first_prompt_is_the_one_that_trains():
    assert templates("cifar224")[0] == "a photo of a {}."
    assert templates("objectnet")[0] == "itap of a {}."
    assert templates("ucf101")[0] == "a photo of a person {}."
    assert "a example of the person practicing {}." in templates("ucf101")


def test_what_is_in_no_table_is_said():
    with pytest.raises(ValueError, match="no benchmark 'mnist'; there is cifar100"):
        benchmark("mnist")
    with pytest.raises(ValueError, match="no templates 'mnist'"):
        templates("mnist")
