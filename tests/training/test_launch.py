# SPDX-License-Identifier: Apache-2.0
"""Launch files of clusters: the commands that they give to each machine."""

import os
import re
import subprocess
from pathlib import Path

import yaml


ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "training_scripts" / "launch"


def stand_in(folder: Path, name: str, script: str) -> None:
    """Write a program."""
    file = folder / name
    file.write_text(f"#!/bin/bash\n{script}\n")
    file.chmod(0o755)


def test_slurm_starts_a_launcher_on_each_machine(tmp_path: Path) -> None:
    stand_in(tmp_path, "scontrol", r'[ "$*" = "show hostnames first,second" ] && printf "first\nsecond\n"')
    stand_in(tmp_path, "srun", 'shift; for i in 0 1; do SLURM_NODEID=$i "$@"; done')
    stand_in(tmp_path, "accelerate", r'printf "[%s]" "$@"; echo')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2"}
    command = [LAUNCH / "slurm.sh", "fsdp2.yaml", "train.py", "--output_dir", "a folder", "--seed=0"]
    done = subprocess.run(
        ["bash", *map(str, command)],
        env={**environment, "SLURM_JOB_NODELIST": "first,second"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    for rank, line in enumerate(done.stdout.splitlines(keepends=True)):
        assert line == (
            "[launch][--config_file][fsdp2.yaml][--num_machines][2][--num_processes][16]"
            f"[--machine_rank][{rank}][--main_process_ip][first][--main_process_port][29500][--rdzv_backend][static]"
            "[train.py][--output_dir][a folder][--seed=0][--resume_from_checkpoint][latest]\n"
        )
    assert done.stdout.count("\n") == 2


def test_kubernetes_names_one_number_of_machines_and_a_pod_that_exists() -> None:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(variables["NUM_MACHINES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(variables["GPUS_OF_NODE"])
    (command,) = container["args"]
    # The host of an indexed job's first pod in a headless service.
    name = job["metadata"]["name"]
    assert f"--main_process_ip {name}-0.{pod['subdomain']} " in command
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for file in re.findall(r"training_scripts/\S+", command):
        assert (ROOT / file).is_file()
