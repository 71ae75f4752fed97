"""data/beam.py: the same tasks by Beam's local runner. Needs apache-beam, which CI does not have.

python3 -m venv .venv-beam && .venv-beam/bin/pip install -e '.[test,beam]'
.venv-beam/bin/python -m pytest tests/test_data_beam.py
"""

import functools

import corpus_fixture
import pytest

from codellama_jax.data import beam, pipeline
from codellama_jax.data.inputs import Input


def request(folder) -> pipeline.Request:
    from test_data_pipeline import records, write_json_lines

    write_json_lines(folder / "lines.jsonl", records(60))
    named = (Input(str(corpus_fixture.tree())), Input(str(folder / "lines.jsonl")))
    return pipeline.Request(named, heldout_rate=0.1, unit_bytes=20_000)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of that library's own
def test_beams_local_runner_gives_the_same_bytes_as_our_processes(tmp_path):
    pytest.importorskip(
        "apache_beam", reason="apache-beam and our protobuf do not install together: see above"
    )
    from test_data_pipeline import content

    asked, tokenizer = request(tmp_path), corpus_fixture.tokenizer()
    ours = pipeline.prepare(tmp_path / "ours", tokenizer, asked)
    engine = functools.partial(beam.run, options=["--runner=FnApiRunner"])
    theirs = pipeline.prepare(tmp_path / "theirs", tokenizer, asked, engine=engine)
    assert content(theirs.folder) == content(ours.folder)


def test_without_beam_its_engine_is_refused_in_a_sentence(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "apache_beam", None)
    engine = functools.partial(beam.run, options=[])
    with pytest.raises(ValueError, match="needs the package apache-beam; install it"):
        pipeline.prepare(
            tmp_path / "out", corpus_fixture.tokenizer(), request(tmp_path), engine=engine
        )
