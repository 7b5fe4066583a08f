"""Many workers' metrics as one exposition that Prometheus can parse."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from galley.engine_metrics import label_sample, merge


def exposition(value: float, label: str) -> str:
    registry = CollectorRegistry()
    Gauge("vllm:running", "Requests.", registry=registry).set(value)
    Counter("vllm:tokens", "Tokens,\nall.", ["model", "worker"], registry=registry).labels(label, "own").inc(
        value
    )
    Histogram("vllm:ttft_seconds", "First token.", ["model"], registry=registry).labels(label).observe(value)
    return generate_latest(registry).decode()


def samples(text: str) -> dict:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@given(st.text(max_size=20), st.text(max_size=20), st.floats(0, 100))
def test_every_sample_gains_its_worker_and_loses_nothing(label, worker, value):
    text = exposition(value, label)
    merged = samples(merge([(worker, text), ("other", text)]))
    for (name, labels), number in samples(text).items():
        renamed = {"exported_worker" if key == "worker" else key: item for key, item in labels}
        expected = tuple(sorted({**renamed, "worker": worker}.items()))
        assert merged[name, expected] == number
    assert len(merged) == (2 if worker != "other" else 1) * len(samples(text))


def test_each_family_is_described_once_and_its_samples_stand_together():
    merged = merge([("a", exposition(1, "m")), ("b", exposition(2, "m"))])
    lines = merged.splitlines()
    assert lines.count("# TYPE vllm:ttft_seconds histogram") == 1
    assert lines.count("# HELP vllm:running Requests.") == 1
    names = [family.name for family in text_string_to_metric_families(merged)]
    assert len(names) == len(set(names))


def test_families_that_only_some_workers_have():
    merged = merge([("a", "# TYPE x gauge\nx 1\n"), ("b", "# TYPE y gauge\ny 2\n# TYPE x gauge\nx 3\n")])
    assert merged == '# TYPE x gauge\nx{worker="a"} 1\nx{worker="b"} 3\n# TYPE y gauge\ny{worker="b"} 2\n'


def test_samples_without_a_description_and_odd_comments():
    merged = merge([("a", "# a comment\n#\n# HELP\nz 1 1700000000\n\n# TYPE x gauge\nx 1\nother 2\n")])
    assert merged == ('z{worker="a"} 1 1700000000\n# TYPE x gauge\nx{worker="a"} 1\nother{worker="a"} 2\n')


def test_labels_of_any_form():
    assert label_sample("x 1", "w") == 'x{worker="w"} 1'
    assert label_sample("x{} 1", "w") == 'x{worker="w"} 1'
    assert label_sample('x{a="} {"} 1', "w") == 'x{worker="w",a="} {"} 1'
    assert label_sample('x{a="1",worker="2"} 1', 'w"\\') == 'x{worker="w\\"\\\\",a="1",exported_worker="2"} 1'
