"""avfast prepare under datatrove's executors: processes of one machine, or a SLURM array (pip install 'avfast[scale]').

    python examples/prepare_datatrove.py clips/ data/mine --tasks 8
    python examples/prepare_datatrove.py clips/ data/mine --tasks 500 --slurm PARTITION --time 04:00:00

A task is one shard of the videos. datatrove keeps its own list of finished tasks, avfast its own of finished videos, so
a task that is started again does only what is left. The last one joins the clips into the data set.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from avfast.prepare import PrepareConfig, prepare


def prepare_shard(config: PrepareConfig, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
    """A step of a datatrove pipeline, which hands no documents on."""
    prepare(replace(config, shard_index=rank, num_shards=world_size))
    return iter(())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("videos", help="folder of videos")
    parser.add_argument("out", help="folder for the data set")
    parser.add_argument("--clip-frames", type=int, default=45)
    parser.add_argument("--tasks", type=int, default=2)
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time, -1: all")
    parser.add_argument("--slurm", metavar="PARTITION", help="submit a job array instead of running here")
    parser.add_argument("--time", default="04:00:00", help="limit of a SLURM job")
    args = parser.parse_args()

    from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor

    config = PrepareConfig(inputs=(args.videos,), out=args.out, clip_frames=args.clip_frames, workers=1)
    step = partial(prepare_shard, config)
    # beside the data set, whose folder is avfast's own
    run: dict[str, Any] = {"logging_dir": f"{Path(args.out)}-datatrove", "tasks": args.tasks, "workers": args.workers}
    if args.slurm:
        SlurmPipelineExecutor([step], time=args.time, partition=args.slurm, job_name="avfast-prepare", **run).run()
    else:
        LocalPipelineExecutor([step], **run).run()


if __name__ == "__main__":
    main()
