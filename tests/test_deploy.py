"""The container and the GKE job: fields that Kubernetes and JobSet know, and a command that jgrpo accepts."""

from pathlib import Path

import yaml

from jgrpo.commands.configs import override, read_config
from jgrpo.config import GRPOConfig
from jgrpo.planning.topology import Slice

DEPLOY = Path(__file__).parent.parent / "deploy"


def read_job():
    job = yaml.safe_load((DEPLOY / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    return job, replicated["template"]["spec"]


def test_the_job_has_a_pod_on_every_host_of_its_slice():
    job, batch = read_job()
    assert set(job["spec"]) == {"failurePolicy", "replicatedJobs"}
    pod = batch["template"]["spec"]
    (container,) = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    hosts = Slice.named(f"v5e:{topology}").chips // chips
    assert batch["parallelism"] == batch["completions"] == hosts == 16
    # A pod that fails ends its job, and the set is started anew as a whole: one host alone cannot go on.
    assert (batch["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_its_command_is_a_run_that_fits_the_slice(monkeypatch):
    monkeypatch.chdir(DEPLOY.parent)
    _, batch = read_job()
    (container,) = batch["template"]["spec"]["containers"]
    command, *rest = container["args"]
    config, options = read_config(command, rest, GRPOConfig, "")
    config = override(config, options, prog="jgrpo grpo")
    config.validate()
    assert config.mesh.size == 64 and config.run_dir.startswith("gs://")


def test_the_image_holds_what_the_package_is_built_from():
    root, lines = DEPLOY.parent, (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"pyproject.toml", "constraints.txt", "model_port", "jgrpo", "configs", "demo"} <= set(copied)
    assert all((root / name).exists() for name in copied)
