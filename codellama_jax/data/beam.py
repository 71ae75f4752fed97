"""Preparing on an existing distributed engine: each round's tasks as an Apache Beam pipeline.

Beam's runners (Dataflow, Flink, Spark, or this machine) take the place of our processes. The tasks
are the same functions, so the bytes are the same. What they hand on to each other lies in the
folder that is prepared: a file system that all workers see, or a bucket. A task that a runner runs
again, or twice at once, makes the same files.
"""

import functools

from codellama_jax.data import tasks
from codellama_jax.data.job import Job


def run(job: Job, name: str, numbers: list[int], *, options: list[str]) -> None:
    """Runs some tasks of a round. options: Beam's, such as --runner=DataflowRunner.

    Raises ValueError where apache-beam is not installed.
    """
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError:
        raise ValueError(
            "this engine needs the package apache-beam; install it, in an environment of its own "
            "(docs/data.md), or leave --engine out"
        ) from None
    with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
        (
            pipeline
            | "tasks" >> beam.Create(numbers)
            | "spread" >> beam.Reshuffle()  # else one worker may get them all
            | name >> beam.Map(functools.partial(_do, job, name))
        )


def _do(job: Job, name: str, number: int) -> None:
    tasks.do(job, name, number)
