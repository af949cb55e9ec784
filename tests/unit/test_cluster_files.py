"""The files of cluster/: each valid by the schema of who reads it, all alike, none of them open to strangers."""

import gzip
import json
import os
import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import yaml
from cryptography import x509
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.util.accelerators import accelerators

import betakd_ray
from betakd_ray.on_ray.cluster import ACCELERATOR
from betakd_ray.on_ray.gauges import NAMES as METRICS
from betakd_ray.spec import ClusterSpec

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KUBERAY = {"rayjob": "RayJob", "raycluster": "RayCluster"}
CLOUDS = ["aws", "gcp"]
FILES = [*KUBERAY, *CLOUDS]


def read(path):
    return yaml.safe_load((CLUSTER / path).read_text())


def manifest(name):
    return read(f"kuberay/{name}.yaml")


def ray_cluster(name):
    """Return the RayCluster's spec, alone or inside a RayJob."""
    spec = manifest(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name):
    """Return the map from group to pod spec; the head is a group too."""
    spec = ray_cluster(name)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]} | {"head": spec["headGroupSpec"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def node_types(file):
    """Return name → resources, labels and numbers of nodes, as Ray's autoscaler reads them; without the head."""
    if file in CLOUDS:
        config = read(f"{file}.yaml")
        return {name: node for name, node in config["available_node_types"].items() if name != config["head_node_type"]}
    types = _generate_available_node_types_from_ray_cr_spec(ray_cluster(file))
    return {name: node for name, node in types.items() if name != "headgroup"}


def slots(node):
    return {name: count for name, count in node["resources"].items() if name.endswith("_slot")}


def pools():
    """Return node type → resources that one process of the pool on that node needs."""
    spec = ClusterSpec(**read("pools.yaml")["cluster"])
    return {"teacher": spec.teacher, "student": spec.student, "cpu": spec.readers}


# ------------------------------------------------------------------------------------------------ valid


@cache
def kuberay(kind):
    """Return a validator by KubeRay's own schema, in which an undeclared field is an error, as for `kubectl`."""
    packed = ROOT / f"tests/schemas/ray.io_{kind.lower()}s.yaml.gz"
    definition = yaml.load(gzip.decompress(packed.read_bytes()), yaml.CSafeLoader)
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(closed(version["schema"]["openAPIV3Schema"]))


def closed(node):
    if isinstance(node, list):
        return [closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    node = {key: closed(value) for key, value in node.items()}
    if isinstance(node.get("properties"), dict) and not node.get("x-kubernetes-preserve-unknown-fields"):
        node.setdefault("additionalProperties", False)
    return node


@pytest.mark.parametrize("name", KUBERAY)
def test_a_manifest_is_valid_by_kuberays_schema(name):
    document = manifest(name)
    assert document["kind"] == KUBERAY[name]
    kuberay(document["kind"]).validate(document)


@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize(
    "where",
    [("autoscalerOptions",), ("headGroupSpec",), ("workerGroupSpecs", 0), ("workerGroupSpecs", 1, "template", "spec")],
)
def test_a_misspelt_field_of_a_manifest_is_refused(name, where):
    document = manifest(name)
    place = document["spec"].get("rayClusterSpec", document["spec"])
    for step in where:
        place = place[step]
    place["lables"] = {}
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        kuberay(document["kind"]).validate(document)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_file_for_ray_up_is_valid_by_rays_validator(cloud):
    validate_config(prepare_config(read(f"{cloud}.yaml")))


@pytest.mark.parametrize("cloud", CLOUDS)
def test_a_misspelt_field_of_a_file_for_ray_up_is_refused(cloud):
    config = prepare_config(read(f"{cloud}.yaml"))
    config["available_node_types"]["teacher"]["lables"] = {}
    with pytest.raises(jsonschema.ValidationError, match="lables"):
        validate_config(config)


def test_the_job_brings_the_same_cluster_that_stays():
    job, cluster = ray_cluster("rayjob"), ray_cluster("raycluster")
    head = job["headGroupSpec"]["template"]["spec"]
    assert head["volumes"].pop() == {"name": "job", "configMap": {"name": "betakd-job"}}
    mount = head["containers"][0]["volumeMounts"].pop()
    assert mount["name"] == "job"
    assert f"{mount['mountPath']}/" in manifest("rayjob")["spec"]["entrypoint"]
    assert job == cluster


# ------------------------------------------------------------------------------------------------ alike


@pytest.mark.parametrize("file", FILES)
def test_every_pool_has_a_node_type_with_its_labels_and_slots(file):
    assert {name: node.get("labels") for name, node in node_types(file).items()} == {
        name: pool.labels for name, pool in pools().items()
    }
    assert {name: set(slots(node)) for name, node in node_types(file).items()} == {
        name: set(pool.resources) for name, pool in pools().items()
    }


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_a_node_has_a_slot_and_the_cpus_for_a_process_on_each_gpu(file, pool):
    resources, process = node_types(file)[pool]["resources"], pools()[pool]
    processes = resources["GPU"] / process.gpus
    assert {name: processes * need for name, need in process.resources.items()} == slots(node_types(file)[pool])
    assert processes * process.cpus <= resources["CPU"]


@pytest.mark.parametrize("file", CLOUDS)
@pytest.mark.parametrize("pool", ["teacher", "student"])
def test_a_node_type_says_what_gpu_ray_will_find_on_it(file, pool):
    """A pool with an accelerator_type needs this; otherwise the autoscaler learns it only from the first node."""
    (named,) = [name for name in node_types(file)[pool]["resources"] if name.startswith(ACCELERATOR)]
    assert named.removeprefix(ACCELERATOR) in {value for name, value in vars(accelerators).items() if name.isupper()}


def counts(file, pool):
    node = node_types(file)[pool]
    return slots(node), node["min_workers"], node["max_workers"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("pool", ["teacher", "student", "cpu"])
def test_pools_are_as_large_everywhere(file, pool):
    assert counts(file, pool) == counts("rayjob", pool)


@pytest.mark.parametrize("file", FILES)
def test_the_teachers_of_a_job_fit_the_nodes_of_their_pool(file):
    (room,), least, most = [*slots(node_types(file)["teacher"]).values()], *counts(file, "teacher")[1:]
    teacher = pools()["teacher"]
    assert teacher.min <= room * least
    assert teacher.max <= room * most


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def images(file):
    """Return node type → image."""
    if file not in CLOUDS:
        return {group: pod["containers"][0]["image"] for group, pod in pods(file).items()}
    config = read(f"{file}.yaml")
    docker = config["docker"]
    return {"head": docker["head_image"]} | {
        name: node.get("docker", {}).get("worker_image", docker["image"]) for name, node in node_types(file).items()
    }


@pytest.mark.parametrize("file", FILES)
def test_every_node_runs_this_version_with_cuda_where_there_are_gpus(file):
    image = f"REGISTRY/betakd_ray:{betakd_ray.__version__}"
    assert images(file) == {
        "head": f"{image}-cpu",
        "teacher": f"{image}-cuda",
        "student": f"{image}-cuda",
        "cpu": f"{image}-cpu",
    }
    assert f"{image}-cpu" in DOCKERFILE
    assert f"{image}-cuda" in DOCKERFILE


@pytest.mark.parametrize("name", KUBERAY)
def test_manifests_name_the_ray_that_is_pinned(name):
    assert ray_cluster(name)["rayVersion"] == pins()["ray"]


# ------------------------------------------------------------------------------------------------ image

DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_the_image_has_the_python_that_the_code_is_checked_with():
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pyright"]["pythonVersion"]
    assert re.findall(r"^FROM (?!base)(\S+)", DOCKERFILE, re.MULTILINE) == [f"python:{checked}-slim-bookworm"]
    assert re.findall(r"^FROM base AS (\w+)", DOCKERFILE, re.MULTILINE) == ["cpu", "cuda"]


def test_whatever_the_image_installs_is_pinned():
    installs = re.findall(r"pip install.*", DOCKERFILE)
    assert installs
    assert all("-c constraints.txt" in install for install in installs)
    requirements = (CLUSTER / "requirements.txt").read_text().splitlines()
    assert all(line.startswith("#") or "==" in line for line in requirements)


def test_the_image_is_given_every_file_that_it_copies():
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    given = [line[1:] for line in ignored if line.startswith("!")]
    assert all((ROOT / path).exists() for path in given)
    assert {"constraints.txt", "cluster/requirements.txt", "pyproject.toml", "README.md", "betakd_ray"} <= {*given}


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_run_as_the_images_own_user_and_no_more(name):
    user = int(re.findall(r"^USER (\d+)", DOCKERFILE, re.MULTILINE)[-1])
    assert f"useradd --create-home --uid {user} " in DOCKERFILE
    for pod in pods(name).values():
        assert pod["securityContext"]["runAsUser"] == user
        assert pod["containers"][0]["securityContext"]["allowPrivilegeEscalation"] is False


# ----------------------------------------------------------------------------------------- spot, probes


@pytest.mark.parametrize("name", KUBERAY)
def test_teachers_and_students_run_on_spot_nodes_and_the_head_on_demand(name):
    capacity = {group: pod["nodeSelector"]["betakd.io/capacity"] for group, pod in pods(name).items()}
    assert capacity == {"head": "on-demand", "cpu": "on-demand", "teacher": "spot", "student": "spot"}
    for pool in ("teacher", "student"):
        assert {"key": "betakd.io/capacity", "value": "spot", "effect": "NoSchedule"} in pods(name)[pool]["tolerations"]


@pytest.mark.parametrize(("cloud", "option"), [("aws", "InstanceMarketOptions"), ("gcp", "scheduling")])
def test_machines_with_gpus_are_spot_and_the_others_are_not(cloud, option):
    types = read(f"{cloud}.yaml")["available_node_types"]
    assert {name for name, node in types.items() if "spot" in str(node["node_config"].get(option)).lower()} == {
        "teacher",
        "student",
    }


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_is_probed_and_has_a_shared_memory_of_its_own(name):
    for pod in pods(name).values():
        container, volumes = pod["containers"][0], {volume["name"]: volume for volume in pod["volumes"]}
        assert {"readinessProbe", "livenessProbe"} <= set(container)
        (shm,) = [mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm"]
        assert volumes[shm]["emptyDir"]["medium"] == "Memory"


def test_a_job_that_failed_is_submitted_again_and_its_cluster_taken_away():
    spec = manifest("rayjob")["spec"]
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


# ------------------------------------------------------------------------------------------ closed, secret


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_asks_for_a_token_and_shows_the_dashboard_to_the_cluster_only(name):
    spec = ray_cluster(name)
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not spec["headGroupSpec"].get("enableIngress")


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_asks_for_a_token_and_shows_the_dashboard_to_the_head_only(cloud):
    config = read(f"{cloud}.yaml")
    starts = [line for key in ("head", "worker") for line in config[f"{key}_start_ray_commands"] if "ray start" in line]
    assert len(starts) == 2
    assert all("export RAY_AUTH_MODE=token" in line for line in starts)
    assert set(config["file_mounts"]) == {"~/.ray/auth_token", "~/.ray/authority"}
    assert "--dashboard-host=127.0.0.1" in starts[0]


def tls_of(environment):
    return {name: value for name, value in environment.items() if "TLS" in name}


@pytest.mark.parametrize("name", KUBERAY)
def test_every_process_of_ray_s_in_a_pod_has_the_pod_s_certificate_and_no_other_container_the_authority(name):
    autoscaler = ray_cluster(name)["autoscalerOptions"]
    for pod in pods(name).values():
        (certificate,) = pod["initContainers"]
        command = certificate["command"]
        assert (ROOT / Path(command[0]).relative_to("/opt/betakd")).exists()
        authority, folder = command[2], command[3]
        assert {mount["mountPath"] for mount in certificate["volumeMounts"]} == {authority, folder}
        for container in (*pod["containers"], autoscaler):
            tls = tls_of({each["name"]: each["value"] for each in container["env"]})
            assert tls.pop("RAY_USE_TLS") == "1"
            assert {Path(path).name for path in tls.values()} == {"tls.crt", "tls.key", "ca.crt"}
            assert {str(Path(path).parent) for path in tls.values()} == {folder}
            assert folder in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert authority not in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_makes_a_node_s_certificate_where_ray_looks_for_it_before_ray_starts(cloud):
    config = read(f"{cloud}.yaml")
    variables = dict(option.removeprefix("--env ").split("=") for option in config["docker"]["run_options"][1:])
    assert {str(Path(value).parent) for name, value in variables.items() if name != "RAY_USE_TLS"} == {
        "/home/ray/.ray/tls"
    }
    for role in ("head", "worker"):
        commands = config[f"{role}_start_ray_commands"]
        (made,) = [at for at, line in enumerate(commands) if "tls.sh node ~/.ray/authority ~/.ray/tls" in line]
        (started,) = [at for at, line in enumerate(commands) if "ray start" in line]
        assert made < started


def test_a_node_s_certificate_is_of_the_authority_and_names_its_addresses(tmp_path):
    authority, node = tmp_path / "authority", tmp_path / "node"
    for command in (
        ["authority", authority],
        ["node", authority, node, "10.0.0.7", "*.betakd.svc", "localhost", "fd00::1"],
    ):
        subprocess.run([CLUSTER / "tls.sh", *command], check=True)
    found = x509.load_pem_x509_certificate((node / "tls.crt").read_bytes())
    found.verify_directly_issued_by(x509.load_pem_x509_certificate((authority / "ca.crt").read_bytes()))
    names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(address) for address in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "fd00::1"]
    assert names.get_values_for_type(x509.DNSName) == ["*.betakd.svc", "localhost"]
    assert found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca is False
    assert all(path.stat().st_mode & 0o077 == 0 for path in (node / "tls.key", authority / "ca.key"))
    before = (authority / "ca.key").read_bytes()
    subprocess.run([CLUSTER / "tls.sh", "authority", authority], check=True)
    assert (authority / "ca.key").read_bytes() == before


@pytest.mark.parametrize("arguments", [[], ["authority"], ["node", "a", "b"]])
def test_too_little_for_a_certificate_is_refused(arguments):
    assert subprocess.run([CLUSTER / "tls.sh", *arguments], capture_output=True).returncode != 0


@pytest.mark.parametrize("cloud", CLOUDS)
def test_no_machine_has_a_public_address_or_a_key_of_the_cloud(cloud):
    config = read(f"{cloud}.yaml")
    assert config["provider"]["use_internal_ips"] is True
    assert "gcp_credentials" not in config["provider"]
    for node in config["available_node_types"].values():
        assert "accessConfigs" not in str(node["node_config"])
        assert {"IamInstanceProfile", "serviceAccounts"} & set(node["node_config"])


def test_strangers_reach_no_port_of_the_pods():
    policy = read("kuberay/networkpolicy.yaml")
    for rule in policy["spec"]["ingress"]:
        everyone = rule["from"] == [{"podSelector": policy["spec"]["podSelector"]}]
        assert everyone or {port["port"] for port in rule["ports"]} <= {8265, 8080}
    submitter = {
        "podSelector": {"matchLabels": {"batch.kubernetes.io/job-name": manifest("rayjob")["metadata"]["name"]}}
    }
    assert any(submitter in rule["from"] for rule in policy["spec"]["ingress"])


def test_everything_of_kubernetes_is_in_one_namespace_and_known_to_the_object_store_by_one_account():
    documents = [read(path.relative_to(CLUSTER)) for path in (CLUSTER / "kuberay").glob("*.yaml")]
    assert {document["metadata"]["namespace"] for document in documents} == {"betakd"}
    account = read("kuberay/serviceaccount.yaml")["metadata"]["name"]
    assert {pod["serviceAccountName"] for name in KUBERAY for pod in pods(name).values()} == {account}


SECRETS = re.compile(
    r"AKIA[0-9A-Z]{16}|PRIVATE KEY|[0-9a-f]{32,}|hf_\w{20,}|(?i:secret_access_key|password)\s*[:=]\s*\S"
)


def test_no_file_holds_a_secret():
    files = [path for path in CLUSTER.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert not [path for path in files if SECRETS.search(path.read_text())]


# ---------------------------------------------------------------------------------------------- metrics


def expressions():
    panels = json.loads((CLUSTER / "grafana/betakd.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_shows_every_metric_and_no_other():
    assert {name for text in expressions() for name in re.findall(r"ray_(\w+)", text)} == METRICS


def test_every_expression_of_the_dashboard_is_of_the_chosen_job():
    assert all('job=~"$job"' in text for text in expressions())


def test_a_scrape_keeps_the_job_that_a_metric_names():
    (config,) = read("prometheus/prometheus.yml")["scrape_configs"]
    (endpoint,) = read("prometheus/podmonitor.yaml")["spec"]["podMetricsEndpoints"]
    assert config["honor_labels"] is True
    assert endpoint["honorLabels"] is True


# -------------------------------------------------------------------------------------------- local.sh

SCRIPT = CLUSTER / "local.sh"
RAY = """#!/usr/bin/env bash
case $1 in
  start) echo "$RAY_AUTH_MODE $CUDA_VISIBLE_DEVICES|$*" >>"$BETAKD_CLUSTER_DIR/calls"; sleep 300; true ;;
  status) sed "s/.*/ 1 node_0a/" "$BETAKD_CLUSTER_DIR/calls" ;;
esac
"""


@pytest.fixture
def local(tmp_path):
    """Return a function that runs local.sh, with a fake `ray` that records its calls."""
    ray = tmp_path / "bin/ray"
    ray.parent.mkdir()
    ray.write_text(RAY)
    ray.chmod(0o755)
    folder = tmp_path / "cluster"
    environment = {"PATH": f"{ray.parent}:{os.environ['PATH']}", "BETAKD_CLUSTER_DIR": str(folder)}

    def run(command, **variables):
        return subprocess.run(
            [SCRIPT, command], env=environment | variables, capture_output=True, text=True, timeout=120
        )

    yield SimpleNamespace(run=run, folder=folder)
    run("stop")


def test_the_script_is_valid_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    assert os.access(SCRIPT, os.X_OK)


def option(call, name):
    found = re.search(rf"--{name}=(\{{.*?\}}|\S*)", call)
    assert found, call
    return found[1]


def test_the_local_cluster_has_the_pools_labels_and_slots_and_asks_for_a_token(local):
    assert local.run("start", TEACHERS="1", STUDENTS="2", GPUS="2").returncode == 0
    calls = (local.folder / "calls").read_text().splitlines()
    assert all(call.startswith("token ") for call in calls)
    assert [call.split("|")[0] for call in calls] == ["token ", "token 0,1", "token 2,3", "token 4,5"]
    expected = [pools()[pool] for pool in ("cpu", "teacher", "student", "student")]
    assert [dict([option(call, "labels").split("=")]) for call in calls] == [pool.labels for pool in expected]
    assert [set(json.loads(option(call, "resources"))) for call in calls] == [set(pool.resources) for pool in expected]
    assert all(int(option(call, "num-cpus")) >= pool.cpus for call, pool in zip(calls, expected, strict=True))


def test_the_local_cluster_listens_on_loopback_and_keeps_its_token_private(local):
    local.run("start")
    calls = (local.folder / "calls").read_text().splitlines()
    assert all(option(call, "node-ip-address").startswith("127.") for call in calls)
    assert option(calls[0], "dashboard-host") == "127.0.0.1"
    assert (local.folder / "token").stat().st_mode & 0o077 == 0
    assert (local.folder / "tls/tls.key").stat().st_mode & 0o077 == 0
    assert not (local.folder / "authority").exists()
    assert local.folder.stat().st_mode & 0o077 == 0


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_stop_ends_what_start_started_and_nothing_else(local):
    with subprocess.Popen(["sleep", "300"], start_new_session=True) as stranger:
        local.run("start")
        groups = [int(path.read_text()) for path in local.folder.glob("*.pid")]
        assert len(groups) == 3
        assert all(alive(group) for group in groups)
        (local.folder / "stranger.pid").write_text(str(stranger.pid))  # as if its number had been a node's before
        assert local.run("stop").returncode == 0
        assert not any(alive(group) for group in groups)
        assert stranger.poll() is None
        stranger.kill()
    assert not [*local.folder.glob("*.pid")]


def test_a_second_start_and_a_stop_without_a_start_are_refused(local):
    assert "no cluster is running" in local.run("stop").stderr
    local.run("start")
    assert "stop it first" in local.run("start").stderr


# ---------------------------------------------------------------------------------------------- README


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"(?<![/\w])cluster/[\w./-]*\w", (CLUSTER / "README.md").read_text()))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
