"""Every node of a Ray cluster takes runs of one study until none is left.

    looptransfer sweep … --ledger postgresql://me@host/runs#widths …      begins the study, from any machine
    python work.py --storage postgresql://me@host/runs --study widths     on a node of the cluster

A node that is lost loses nothing that is finished: its run is open again for the others.
"""

import argparse
import subprocess
import sys

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


@ray.remote(max_retries=0)
def work(storage: str, study: str, options: list[str]) -> None:
    """Take runs on this node, one worker for each of its GPUs or cores."""
    command = [sys.executable, "-m", "looptransfer", "work", "--storage", storage, study, *options]
    subprocess.run(command, check=True)


def work_everywhere(storage: str, study: str, options: list[str]) -> int:
    """Work on every node that is alive, and return on how many it came to an end."""
    tasks = {}
    for node in ray.nodes():
        if node["Alive"]:
            place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            tasks[node["NodeID"]] = work.options(scheduling_strategy=place).remote(storage, study, options)
    ended = 0
    for node, task in tasks.items():
        try:
            ray.get(task)
            ended += 1
        except ray.exceptions.RayError as error:
            print(f"node {node}: {type(error).__name__}; the others take its runs", file=sys.stderr)
    return ended


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", required=True)
    parser.add_argument("--study", required=True)
    arguments, options = parser.parse_known_args()
    ray.init(address="auto")
    sys.exit(0 if work_everywhere(arguments.storage, arguments.study, options) else 1)
